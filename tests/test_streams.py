"""Output that is closed, full, ASCII alone or cut off by `| head` ends no program and leaves no litter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")

SCRIPT = """
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from runtime.command import run_command
from runtime.errors import InputError
from runtime.files import write_atomically
from runtime.log import log, log_to_file, progress

@dataclass(frozen=True)
class Config:
    bad: bool = False
    '''End with an error.'''

def main(config):
    log_to_file(Path("train.log"))
    for index in progress(range(3000), "Zürich", "step"):
        log.info("Zürich \\udce9 %d", index)
    print("to the error stream", file=sys.stderr)
    warnings.warn("one warning")
    write_atomically(Path("result.txt"), lambda path: path.write_text("whole"))
    if config.bad:
        raise InputError("--bad", "ist möglich", "lass es")

run_command(main, Config, "test")
"""
PYTHON = f'"{sys.executable}" made_up.py'


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"{PYTHON} >/dev/null", 0),
        (f"PYTHONIOENCODING=ascii {PYTHON} >ascii.txt", 0),
        (f"PYTHONIOENCODING=ascii {PYTHON} --bad >ascii.txt", 2),
        (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {PYTHON} --bad >/dev/null", 2),
        (f"{PYTHON} >&-", 0),
        (f"{PYTHON} >&- 2>&-", 0),
        (f"{PYTHON} <&- >&- 2>&- --bad", 2),
        (f"({PYTHON}; echo $? >code.txt) | head -n 1 >/dev/null; exit $(cat code.txt)", 0),
        (f"({PYTHON} --bad 2>&1; echo $? >code.txt) | head -n 1 >/dev/null; exit $(cat code.txt)", 2),
        (f"{PYTHON} >/dev/full", 0),
        (f"{PYTHON} >/dev/full 2>&1 --bad", 2),
    ],
)
def test_a_program_works_whatever_its_output_is(tmp_path: Path, line: str, code: int) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("Linux alone has it")
    (tmp_path / "made_up.py").write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    stderr = done.stderr.decode("utf-8", errors="replace")
    assert done.returncode == code, stderr
    for word in ("Traceback", "Exception ignored", "Logging error"):
        assert word not in stderr
    assert (tmp_path / "result.txt").read_text() == "whole"
    assert len((tmp_path / "train.log").read_bytes().splitlines()) == 3000
    litter = {path.name for path in tmp_path.iterdir()}
    assert litter <= {"made_up.py", "result.txt", "train.log", "ascii.txt", "code.txt"}
    if (tmp_path / "ascii.txt").exists():
        assert (tmp_path / "ascii.txt").read_bytes().startswith(b"Z\\xfcrich \\udce9 0\n")
