"""The number of threads a CPU computes with follows what is measured."""

import itertools

import pytest
import torch

from runtime import cpu_threads
from runtime.cpu_threads import ROUNDS, choose_threads


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores whose step takes so many seconds by its number of threads."""
    state = {"threads": 4, "now": 0.0, "steps": [], "seconds": {}}
    monkeypatch.setattr(cpu_threads, "_most", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: state.update(threads=count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(cpu_threads.time, "perf_counter", lambda: state["now"])

    def step():
        state["steps"].append(state["threads"])
        taken = state["seconds"][state["threads"]]
        state["now"] += next(taken) if hasattr(taken, "__next__") else taken

    state["step"] = step
    return state


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [({4: 1.0, 2: 1.8, 1: 3.5}, 4), ({4: 9.0, 2: 1.8, 1: 3.5}, 2), ({4: 9.0, 2: 8.0, 1: 3.5}, 1)],
)
def test_the_fastest_number_is_taken_and_a_change_is_logged(machine, caplog, seconds, fastest):
    caplog.set_level("INFO", "drunet")
    machine["seconds"] = seconds
    choose_threads(machine["step"])
    assert machine["threads"] == fastest
    assert bool(caplog.messages) == (fastest != 4)
    assert all(f"computing with {fastest} of 4 threads" in message for message in caplog.messages)


def test_a_small_gain_changes_nothing(machine):
    machine["seconds"] = {4: 1.0, 2: 0.95, 1: 3.0}
    choose_threads(machine["step"])
    assert machine["threads"] == 4


def test_a_single_slow_step_decides_nothing_and_the_first_is_not_timed(machine):
    machine["seconds"] = {4: iter([50.0, 1.0, 30.0, 1.0]), 2: iter([2.0] * 4), 1: iter([3.0] * 4)}
    choose_threads(machine["step"])
    assert machine["threads"] == 4
    assert machine["steps"] == [4, 2, 1] * (ROUNDS + 1)  # in turn, so that a busy second hits all alike


def test_it_goes_back_to_more_threads_when_the_machine_is_free_again(machine):
    machine["seconds"] = {4: 9.0, 2: 8.0, 1: 3.5}
    choose_threads(machine["step"])
    machine["seconds"] = {4: 1.0, 2: 1.8, 1: 3.5}
    choose_threads(machine["step"])
    assert machine["threads"] == 4


def test_one_thread_is_not_measured(machine, monkeypatch):
    monkeypatch.setattr(cpu_threads, "_most", 1)
    choose_threads(machine["step"])
    assert machine["steps"] == []


def test_a_real_step_leaves_a_number_that_was_tried(monkeypatch):
    monkeypatch.setattr(cpu_threads, "_most", 2)
    before = torch.get_num_threads()
    counter = itertools.count()
    try:
        choose_threads(lambda: next(counter))
        assert torch.get_num_threads() in (1, 2)
        assert next(counter) == 2 * (ROUNDS + 1)
    finally:
        torch.set_num_threads(before)
