"""A folder that one program at a time works in, and what killed programs left there."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import train_drunet_v2 as train
from audit.output import Output, check_outputs
from cohort.selection import TrainingSource
from runtime import checkpoints, claims, command
from runtime.claims import LOCK, claim_folder, claim_new_folder
from runtime.files import check_output_folder, make_plain_name, write_atomically
from training.resume import settings_of_resumed
from training.start import place_run

ROOT = Path(__file__).resolve().parents[1]
ExpectInputError = Callable[..., AbstractContextManager[None]]

# Claims a folder, forks a process that outlives it, as loader workers do, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from runtime.claims import claim_folder, release_claims
claim_folder(Path(sys.argv[1]), "")
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("ready", flush=True)
sys.stdin.readline()
release_claims()
"""


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    claims.release_claims()


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Function that lets another process claim a folder."""
    holders = []

    def start(folder: Path) -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        holders.append(holder)
        assert holder.stdout.readline() == "ready\n"
        return holder

    yield start
    for holder in holders:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_a_second_program_is_refused_until_the_first_has_ended_or_was_killed(
    tmp_path: Path, hold: Callable, input_error: ExpectInputError
) -> None:
    folder = tmp_path / "run"
    holder = hold(folder)
    with input_error(folder, f"process {holder.pid} on ", "wait for it"):
        claim_folder(folder, "wait for it")
    source = TrainingSource(str(tmp_path))
    config = train.TrainConfig(run="run", results_dir=str(tmp_path), source=source)
    with input_error(folder, "another --run"):
        place_run(config)
    os.kill(holder.pid, signal.SIGKILL)  # the process it forked lives on
    holder.wait()
    claim_folder(folder, "")
    assert (folder / LOCK).exists()
    claims.release_claims()
    assert list(folder.iterdir()) == []
    holder = hold(folder)
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.wait(timeout=120) == 0
    claim_folder(folder, "")


def test_default_names_do_not_collide_and_leave_no_empty_folder(tmp_path: Path) -> None:
    assert claim_new_folder(tmp_path, "run", "") == "run"
    assert claim_new_folder(tmp_path, "run", "") == "run_2"
    (tmp_path / "run_3").mkdir()
    assert claim_new_folder(tmp_path, "run", "") == "run_4"
    (tmp_path / "run_2" / "config.json").touch()
    claims.release_claims()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_2", "run_3"]


def test_a_run_that_has_ended_meanwhile_is_not_written_over(
    tmp_path: Path, input_error: ExpectInputError
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    config = train.TrainConfig(run="run", results_dir=str(tmp_path), source=TrainingSource(str(tmp_path)))
    with input_error("--run run", "--resume"):
        place_run(config)


def test_without_locks_one_warning_is_all(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(claims, "fcntl", None)
    monkeypatch.setattr(claims, "_warned", False)
    with caplog.at_level("WARNING", logger="drunet"):
        claim_folder(tmp_path / "a", "")
        claim_folder(tmp_path / "b", "")
    assert len(caplog.records) == 1
    assert "cannot be locked" in caplog.text


def test_a_file_in_place_of_a_folder_is_one_sentence(tmp_path: Path, input_error: ExpectInputError) -> None:
    (tmp_path / "results").touch()
    for folder in (tmp_path / "results", tmp_path / "results" / "run"):
        with input_error(folder, "no folder"):
            claim_folder(folder, "")


def test_half_written_files_of_killed_programs_are_swept_and_no_others(tmp_path: Path) -> None:
    killed = []

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        killed.append(temporary)
        os.link(temporary, temporary.with_name("kept"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "last.pt", write)
    for name in (".2024.notes.txt", ".drunet_written", "drunet_temporary_1_x", "last.pt"):
        (tmp_path / name).touch()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / LOCK).touch()  # another program may be at work there
    for place in (tmp_path, tmp_path / "evaluation", tmp_path / "elsewhere"):
        (place / killed[0].name).write_text("half")  # as SIGKILL leaves it
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    claim_folder(tmp_path, "")
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - {Path(LOCK)}
    assert before - after == {Path(killed[0].name), Path("evaluation") / killed[0].name}


def test_a_folder_in_which_a_program_was_killed_before_it_wrote_is_no_folder_of_others(
    tmp_path: Path, input_error: ExpectInputError
) -> None:
    (tmp_path / LOCK).touch()
    check_output_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    with input_error(tmp_path, "--overwrite"):
        check_output_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "../../x",
    "/abs",
    "",
    " ",
    "a/b",
    "a\\b",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "a\tb",
    "a\u2028b",
    "x" * 300,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_with_a_path_in_it_is_refused_wherever_it_comes_from(
    name: str, input_error: ExpectInputError, make_cases: Callable, tmp_path: Path
) -> None:
    with input_error("--run", "one plain name"):
        command.parse(train.TrainConfig, arguments=["--run", name])
    with input_error("--run", "one plain name"):
        command.from_plain(train.TrainConfig, {"run": name})
    with input_error("the case", "one plain name"):
        check_outputs(Output(tmp_path, ("WT",)), make_cases([(name, "p")]))
    command.check_settings(train.TrainConfig(run=make_plain_name(name) + "_20260101"))


@pytest.mark.parametrize("name", ["rec", "BraTS2021_1", "Zürich $x$", ".hidden", "a..b", "-x", "名"])
def test_plain_names_are_taken(name: str) -> None:
    command.check_settings(train.TrainConfig(run=name))


def test_a_run_is_resumed_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"config": command.to_plain(train.TrainConfig(run="old")), "epoch": 1, "best_epoch": 1}
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda _: content)
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    settings = settings_of_resumed(Path(), lambda defaults: defaults)
    assert Path(settings.results_dir, settings.run) == tmp_path / "old"
