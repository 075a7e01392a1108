"""A machine that runs out of memory, processes or handles: one sentence with the flag that helps."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from runtime.checkpoints import load_checkpoint
from runtime.exhausted import explain_exhausted

ROOT = Path(__file__).resolve().parents[1]
TRAIN, SEGMENT = {"workers", "batch_size", "checkpointing"}, {"batch_size"}


class Greedy(Dataset):
    """Runs out of memory in the way asked for."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if self.way == "numpy":
            np.empty(2**60, np.uint8)
        if self.way == "opencv":
            raise cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes")
        raise MemoryError


@pytest.mark.parametrize("way", ["numpy", "opencv", "python"])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_runs_out_in_a_worker_or_here_is_explained(way: str, workers: int) -> None:
    with pytest.raises((RuntimeError, MemoryError, cv2.error)) as caught:
        next(iter(DataLoader(Greedy(way), num_workers=workers)))
    explained = str(explain_exhausted(caught.value, TRAIN))
    assert "out of memory" in explained
    assert "--workers 0" in explained
    assert "\n" not in explained
    assert "--workers" not in str(explain_exhausted(caught.value, SEGMENT))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(12, "Cannot allocate memory"), "--batch-size"),
        (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), "--batch-size"),
    ],
)
def test_other_limits_are_explained(error: Exception, remedy: str) -> None:
    for flags in (TRAIN, SEGMENT):
        explained = str(explain_exhausted(error, flags))
        assert remedy in explained
        assert ("--workers" in explained) <= (flags is TRAIN)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker in /proc")
def test_a_run_whose_worker_is_killed_keeps_its_last_epoch(tmp_path: Path, phantom_cohort: Path) -> None:
    flags = ["--size", "48", "--widths", "4", "8", "--batch-size", "4", "--slabs-per-epoch", "64"]
    flags += ["--workers", "1", "--device", "cpu", "--epochs", "500", "--run", "robbed", "--no-amp"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_drunet_v2.py"), "--data-dir", str(phantom_cohort), *flags],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = tmp_path / "results" / "robbed" / "last.pt"
    deadline = time.monotonic() + 600
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)  # as the kernel does where memory runs out
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 2, stderr
    assert "Traceback" not in stderr
    assert "--workers 0" in stderr
    assert load_checkpoint(last)["epoch"] >= 1
