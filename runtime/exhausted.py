"""Errors of a machine that ran out of something, as one sentence that names the flag that helps."""

import re
from collections.abc import Collection

import cv2
import torch

from runtime.errors import InputError

# What torch says in a RuntimeError, whatever its type; see torch/utils/data/_utils and c10.
NO_SHARED_MEMORY = re.compile(r"bus error|shared memory|/torch_\d|\(shm\)", re.IGNORECASE)
DEAD_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)", re.DOTALL)
INPUT_OF_WORKER = re.compile(
    r"Caught InputError in DataLoader worker.*runtime\.errors\.InputError: (.+?)\.?\s*$", re.DOTALL
)
NO_CARD_MEMORY = re.compile(
    r"out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|unable to find a valid cuDNN algorithm", re.IGNORECASE
)
# The third is of NumPy, the fourth of OpenCV: their own error types do not survive the way out of a worker.
NO_MEMORY = re.compile(
    r"(can't|cannot) allocate memory|not enough memory|unable to allocate .* for an array|"
    r"insufficient memory|MemoryError|std::bad_alloc",
    re.IGNORECASE,
)
NO_PROCESS = re.compile(r"can't start new thread|Resource temporarily unavailable", re.IGNORECASE)
NO_HANDLE = re.compile(r"too many open files|received 0 items of ancdata", re.IGNORECASE)


def explain_exhausted(error: BaseException, flags: Collection[str]) -> InputError | None:
    """Return the InputError to show where a machine ran out of memory or lost a process, else None.

    `flags` are the names of the command's settings, "batch_size" for --batch-size: only those are advised.
    """
    kinds = RuntimeError | MemoryError | OSError | cv2.error
    if isinstance(error, InputError) or not isinstance(error, kinds):
        return None
    if match := INPUT_OF_WORKER.search(str(error)):  # torch raises the text of it alone, in a RuntimeError
        return InputError("a loader worker", " ".join(match[1].split()))
    text = f"{error} {getattr(error, 'filename', None) or ''}"
    has_workers = "workers" in flags
    smaller = "pass a smaller --batch-size" if "batch_size" in flags else "close other programs"
    if NO_HANDLE.search(text):
        remedy = "pass --workers 0 or raise the limit (ulimit -n)" if has_workers else "raise it (ulimit -n)"
        return InputError("this machine", "lets a program open no more files at once", remedy)
    if has_workers and NO_SHARED_MEMORY.search(text):
        return InputError(
            "/dev/shm",
            "a loader worker found no shared memory",
            "pass --workers 0, or start the container with more (docker run --shm-size 2g)",
        )
    if has_workers and DEAD_WORKER.search(text):
        return InputError(
            "--workers",
            "a loader worker was killed, most likely for want of memory",
            "pass --workers 0 or a smaller --batch-size; in a container more memory or --shm-size",
        )
    if isinstance(error, torch.cuda.OutOfMemoryError) or NO_CARD_MEMORY.search(text):
        more = " (training: with --accumulate, or pass --checkpointing)" if "checkpointing" in flags else ""
        return InputError("--device", "the card is out of memory", smaller + more)
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        remedy = f"{smaller} or --workers 0" if has_workers else smaller
        return InputError("this machine", "is out of memory", remedy)
    if NO_PROCESS.search(text):
        remedy = "pass --workers 0 or raise the limit (ulimit -u)" if has_workers else "raise it (ulimit -u)"
        return InputError("this machine", "lets you start no more processes or threads", remedy)
    return None
