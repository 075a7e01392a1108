"""Damaged files of every kind that is read: refused in one sentence, or read without harm; see tests/fuzz."""

import logging
from collections.abc import Iterator

import pytest

from tests.fuzz.run import LONGEST_S, MOST_BYTES, fuzz
from tests.fuzz.targets import TARGETS

COUNT = 250  # per target; python -m tests.fuzz goes on from there


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What readers warn of in thousands of damaged files is left out."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_in_one_sentence_or_read_without_harm(name, tmp_path):
    if name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    report = fuzz(name, COUNT, 0, tmp_path)
    assert not report.errors, f"{report.sentence}; first {report.errors[0]}"
    assert report.refused + report.accepted == report.tried >= COUNT
    assert report.longest_s < LONGEST_S
    assert report.peak_bytes < MOST_BYTES


def test_the_same_seed_damages_alike_and_another_one_otherwise():
    import random

    from tests.fuzz.targets import damage

    target = TARGETS["split"]
    seeds = target.seeds()
    damaged = [[damage(target, seeds, random.Random(f"{seed} 5"))[1] for _ in "ab"] for seed in (0, 1)]
    assert damaged[0][0] == damaged[0][1] != damaged[1][0] == damaged[1][1]


def test_a_broken_promise_is_reported(tmp_path, monkeypatch):
    import dataclasses

    target = dataclasses.replace(TARGETS["different"], read=lambda path: 1 // (len(path.read_bytes()) == 19))
    monkeypatch.setitem(TARGETS, "different", target)
    report = fuzz("different", 20, 0, tmp_path)
    assert report.errors
    assert {problem.split(":")[0] for problem, _ in report.errors} == {"ZeroDivisionError"}
