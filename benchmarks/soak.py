"""Does a long training hold ever more memory or open files?

    python -m benchmarks.soak --epochs 200

Trains on phantoms in a folder of its own and reads /proc (Linux) after each epoch: memory and open handles of
the program and its loader worker, pages that both use counted twice.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import print_table, write_result
from cohort.phantom import write_cohort
from runtime.command import run_command

TRAIN = Path(__file__).resolve().parents[1] / "train_drunet_v2.py"
FLAGS = "--widths 4 8 --size 48 --batch-size 8 --slabs-per-epoch 16 --workers 1 --device cpu --early-stop 999"


@dataclass(frozen=True)
class SoakConfig:
    """Settings of the soak."""

    epochs: int = 200


def look(pid: int) -> dict[str, float]:
    """Return memory and open handles of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {"workers": len(children), "memory_mb": 0.0, "handles": 0}
    for each in (str(pid), *children):
        status = Path(f"/proc/{each}/status").read_text()
        found["memory_mb"] += int(status.partition("VmRSS:")[2].split()[0]) / 1000
        found["handles"] += len(list(Path(f"/proc/{each}/fd").iterdir()))
    return found


def main(config: SoakConfig) -> None:
    """Train and write benchmarks/results/soak.json."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(Path(folder, "data"), 4, 0, (16, 48, 48), (10.0, 5.0, 5.0), "internal")
        flags = ["--data-dir", "data", "--run", "soak", "--epochs", str(config.epochs), *FLAGS.split()]
        log = Path(folder, "results", "soak", "log.csv")
        run = subprocess.Popen([sys.executable, str(TRAIN), *flags], cwd=folder, stdout=subprocess.DEVNULL)
        while run.poll() is None:
            epoch = len(log.read_text().splitlines()) - 1 if log.exists() else 0
            if epoch > (rows[-1]["epoch"] if rows else 0):
                with contextlib.suppress(OSError):  # it has just ended
                    rows.append({"epoch": epoch, **look(run.pid)})
            time.sleep(0.02)
    write_result("soak", {"flags": FLAGS, "epochs": rows})
    print_table([row for row in rows if row["epoch"] == 1 or row["epoch"] % 20 == 0])


if __name__ == "__main__":
    run_command(main, SoakConfig, __doc__)
