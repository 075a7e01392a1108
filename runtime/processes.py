"""One function over many items, shared among processes of one thread each."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2
import torch

from runtime import signals
from runtime.errors import InputError
from runtime.log import progress

MOST_PROCESSES = 8  # each holds an item's data in memory
ITEMS_A_PROCESS = 4  # fewer are not worth a process, which takes seconds to start

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_process() -> None:
    """Keep a process to one thread, and leave Ctrl-C to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, unit: str
) -> Iterator[Result]:
    """Yield function(item) for each item, in order, with progress.

    A process per core works on them, or this one alone where there are few items. Function, items and results
    are pickled; the processes inherit neither threads nor devices. The first error ends them all. Raises
    InputError where a process is killed.
    """
    count = min(count_cores(), MOST_PROCESSES, len(items) // ITEMS_A_PROCESS)
    if count <= 1:
        yield from progress(map(function, items), title, unit, len(items))
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=start_process) as pool:
        try:
            yield from progress(pool.map(function, items), title, unit, len(items))
        except BrokenProcessPool as error:
            if signals.is_stopping():  # sent to the whole group of processes
                raise signals.Stopped from error
            raise InputError(
                title,
                "a process was killed, most likely for want of memory",
                "close other programs and run again",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
