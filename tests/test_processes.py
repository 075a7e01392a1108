"""A function over many items: the same results, in order, in one process and in several; what ends it."""

import os
import signal
import time

import cv2
import pytest
import torch

from runtime import processes
from runtime.processes import map_in_processes


def describe(number: int) -> tuple[int, int, int, int, bool]:
    """Return the number, its process, its threads, and whether Ctrl-C is ignored; later ones are faster."""
    time.sleep(0.02 * (8 - number))
    ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return number, os.getpid(), torch.get_num_threads(), cv2.getNumThreads(), ignores


def die_at_two(number: int) -> None:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(processes, "count_cores", lambda: 2)


@pytest.mark.usefixtures("two_cores")
def test_results_come_in_the_order_of_the_items_from_processes_of_one_thread():
    described = list(map_in_processes(describe, range(8), "describing", "number"))
    assert [number for number, *_ in described] == list(range(8))
    pids = {pid for _, pid, *_ in described}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert all(rest[1:] == [1, 1, True] for _, *rest in described)


@pytest.mark.parametrize(("cores", "items"), [(1, 40), (8, 7), (8, 0)])
def test_few_items_or_one_core_stay_in_this_process(monkeypatch, cores, items):
    monkeypatch.setattr(processes, "count_cores", lambda: cores)
    threads = torch.get_num_threads()
    results = list(map_in_processes(lambda number: (number, os.getpid()), range(items), "x", "item"))
    assert results == [(number, os.getpid()) for number in range(items)]
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.usefixtures("two_cores")
def test_a_killed_process_is_one_sentence(input_error):
    with input_error("preparing cases: ", "killed", "memory", "run again"):
        list(map_in_processes(die_at_two, range(8), "preparing cases", "case"))
