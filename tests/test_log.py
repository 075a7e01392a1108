"""What a program says: on the terminal, in a file, and how far long work is."""

import logging
from pathlib import Path

import pytest

from runtime import log as log_module
from runtime.log import close_log, log, log_to_file, progress, start_log


@pytest.fixture(autouse=True)
def _quiet_after() -> None:
    yield
    close_log()


def test_words_go_to_the_terminal_and_with_the_time_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_log()
    log.info("before the file")
    log_to_file(tmp_path / "train.log")
    log.info("epoch %d", 3)
    log.warning("the crop is small")
    assert capsys.readouterr().out == "before the file\nepoch 3\nwarning: the crop is small\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["epoch 3", "warning: the crop is small"]
    assert len(lines[0].split(" ")[1].split(":")) == 3


def test_starting_again_says_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    start_log()
    start_log()
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_other_ranks_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_module, "is_main", lambda: False)
    start_log()
    log_to_file(tmp_path / "train.log")
    log.warning("from rank 1")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "train.log").exists()


def test_progress_gives_every_item_and_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_log()
    clock = iter(range(0, 1000, 20))  # s; an item takes 20
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(clock))
    bar = progress(range(6), "auditing", "case")
    seen = []
    for item in bar:
        seen.append(item)
        bar.note(f"Dice 0.{item}")
    assert seen == list(range(6))
    assert capsys.readouterr().out.splitlines() == [
        "auditing: 2 of 6 cases, 1.3 min left, Dice 0.1",
        "auditing: 4 of 6 cases, 0.7 min left, Dice 0.3",
    ]  # every 30 s at most, and none at the end


def test_progress_over_something_of_unknown_length(capsys: pytest.CaptureFixture[str]) -> None:
    start_log()
    assert list(progress(iter("abc"), "reading", "file")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_third_parties_are_not_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    start_log()
    logging.getLogger("somebody.else").info("noise")
    assert capsys.readouterr().out == ""
