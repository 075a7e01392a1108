"""Settings and command lines: what is typed, what is refused, how a command ends."""

import dataclasses
import errno
import json
import math
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from runtime.command import (
    Count,
    CountOrZero,
    Decay,
    Distinct,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    check_settings,
    command_line,
    from_plain,
    parse,
    run_command,
    to_plain,
)
from runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where things are."""

    data_dir: str | None = None
    """folder of the cohort"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a made-up command."""

    # a heading that is no help text
    place: tyro.conf.OmitArgPrefixes[Place] = Place()
    amp: bool = True
    """mixed precision"""
    plain_loss: bool = False
    """no focal part"""
    device: Literal["auto", "cpu"] = "auto"
    """where to compute"""
    mode: Literal["fast", "slow"] | None = None
    """a choice that may be unset"""
    threshold: Share | None = None
    """probability from which a voxel is tumour"""
    widths: tuple[Count, ...] = (4, 8)
    """filters per level"""
    regions: Annotated[tuple[Literal["WT", "TC", "ET"], ...], Distinct()] = ("WT",)
    """regions to segment"""
    learning_rate: Positive = 1e-4
    """step size"""
    offset: int = 0
    """any number"""
    workers: CountOrZero = 2
    """processes"""
    ema: Decay = 0.0
    """decay of the average"""


DEFAULTS = Settings()


def parse_text(text: str, defaults: Settings | None = None) -> Settings:
    return parse(Settings, "A made-up command.", defaults, shlex.split(text))


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------


def test_without_arguments_the_settings_are_the_defaults() -> None:
    assert parse_text("") == DEFAULTS
    assert parse_text("", Settings(offset=3, widths=(1,))) == Settings(offset=3, widths=(1,))


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ("--amp", "amp", True),
        ("--no-amp", "amp", False),
        ("--plain-loss", "plain_loss", True),
        ("--no-plain-loss", "plain_loss", False),
        ("--device cpu", "device", "cpu"),
        ("--mode slow", "mode", "slow"),
        ("--threshold 0.4", "threshold", 0.4),
        ("--widths 16", "widths", (16,)),
        ("--widths 16 32 64", "widths", (16, 32, 64)),
        ("--regions WT ET", "regions", ("WT", "ET")),
        ("--data-dir some/where", "place", Place("some/where")),
        ("--data-dir=some/where", "place", Place("some/where")),
        ("--learning-rate 3e-5", "learning_rate", 3e-5),
        ("--offset -7", "offset", -7),
        ("--ema 0", "ema", 0.0),
        ("--workers 0", "workers", 0),
        ("--threshold 1", "threshold", 1.0),
    ],
)
def test_a_flag_sets_its_field_and_no_other(arguments: str, field: str, value: object) -> None:
    settings = parse_text(arguments)
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)
    assert dataclasses.replace(settings, **{field: getattr(DEFAULTS, field)}) == DEFAULTS


def test_what_is_typed_wins_over_other_defaults_even_where_it_is_the_usual_default() -> None:
    other = Settings(offset=3, widths=(1,), amp=False)
    assert parse_text("--offset 0 --amp", other) == Settings(offset=0, widths=(1,), amp=True)


@pytest.mark.parametrize(
    "arguments",
    [
        "--width 16",  # abbreviations would change meaning when a flag is added
        "--learning 1",
        "--no-am",
        "--device tpu",
        "--mode none",
        "--widths 16 x",
        "--offset 1.5",
        "--learning-rate fast",
        "--amp true",
        "--regions WT XX",
        "--unknown",
        "stray",
    ],
)
def test_what_the_command_line_does_not_know_is_named_in_one_sentence(
    arguments: str, input_error: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    with input_error("the command line", arguments.split()[-1], "--help"):
        parse_text(arguments)
    assert capsys.readouterr() == ("", "")


def test_a_long_complaint_is_one_sentence_too(input_error: Callable) -> None:
    with input_error("--unknown", "w " * 10 + "w"):
        parse_text("--unknown " + "'" + "w " * 300 + "'")


@pytest.mark.parametrize(
    ("arguments", "flag", "range_"),
    [
        ("--threshold 50", "--threshold 50", "from 0 to 1"),
        ("--threshold -0.1", "--threshold -0.1", "from 0 to 1"),
        ("--learning-rate 0", "--learning-rate 0", "above 0"),
        ("--learning-rate nan", "--learning-rate nan", "above 0"),
        ("--learning-rate inf", "--learning-rate inf", "above 0"),
        ("--widths 4 0", "--widths 0", "1 or more"),
        ("--workers -1", "--workers -1", "0 or more"),
        ("--ema 1", "--ema 1", "without 1"),
        ("--regions WT WT", "--regions WT WT", "twice"),
    ],
)
def test_a_value_out_of_its_range_is_an_input_error(
    arguments: str, flag: str, range_: str, input_error: Callable
) -> None:
    with input_error(flag, range_):
        parse_text(arguments)


@given(
    low=st.integers(-5, 5),
    width=st.integers(0, 5),
    above=st.booleans(),
    below=st.booleans(),
    value=st.floats(-12, 12) | st.integers(-12, 12) | st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_range_holds_what_lies_between_its_ends(
    low: int, width: int, above: bool, below: bool, value: float
) -> None:
    allowed = Range(low, low + width, above, below)
    inside = (
        low <= value <= low + width and not (above and value == low) and not (below and value == low + width)
    )
    assert allowed.holds(value) == inside


def test_help_shows_every_flag_with_text_default_and_range(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parse_text("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A made-up command." in text
    for name, help_text in {
        "--data-dir": "folder of the cohort",
        "--amp, --no-amp": "mixed precision",
        "--widths": "filters per level (default: 4 8)",
        "--learning-rate FLOAT above 0": "step size (default: 0.0001)",
        "--workers INT 0 or more": "processes (default: 2)",
        "--device {auto,cpu}": "where to compute (default: auto)",
    }.items():
        assert name in text
        assert help_text in text
    assert "heading" not in text


# ------------------------------------------------------------------------------------------------------------
# Plain values
# ------------------------------------------------------------------------------------------------------------


@given(
    data_dir=st.none() | st.text(),
    amp=st.booleans(),
    widths=st.lists(st.integers(1, 2000), max_size=5),
    learning_rate=st.floats(1e-9, 10),
    regions=st.lists(st.sampled_from(["WT", "TC", "ET"]), min_size=1, unique=True),
)
def test_settings_come_back_from_a_json_file(
    data_dir: str | None, amp: bool, widths: list[int], learning_rate: float, regions: list[str]
) -> None:
    settings = Settings(
        Place(data_dir), amp, widths=tuple(widths), learning_rate=learning_rate, regions=tuple(regions)
    )
    plain = json.loads(json.dumps(to_plain(settings)))
    assert plain["data_dir"] == data_dir  # nesting is for the code, not for the file
    assert from_plain(Settings, plain) == settings


def test_plain_values_of_another_version_keep_what_is_known() -> None:
    assert from_plain(Settings, {"offset": 4, "cache_gb": 50.0}) == Settings(offset=4)


def test_a_file_is_held_to_the_same_ranges(input_error: Callable) -> None:
    with input_error("--learning-rate -1"):
        from_plain(Settings, {"learning_rate": -1.0})


def test_seed_and_not_negative_are_ranges_too(input_error: Callable) -> None:
    @dataclasses.dataclass(frozen=True)
    class More:
        seed: Seed = 0
        decay: NotNegative = 0.0

    assert from_plain(More, {"seed": 2**31 - 1, "decay": 0}) == More(2**31 - 1, 0)
    for plain in ({"seed": 2**31}, {"seed": -1}, {"decay": -1e-9}):
        with input_error(f"--{next(iter(plain))}"):
            from_plain(More, plain)


# ------------------------------------------------------------------------------------------------------------
# How a command ends
# ------------------------------------------------------------------------------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[[Settings], None]
) -> tuple[int, str]:
    """Run a main function as a command; return its exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["/some/where/made_up.py", "--offset", "5"])
    code = 0
    try:
        run_command(main, Settings, "A made-up command.")
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[Settings], None]:
    def main(_settings: Settings) -> None:
        raise error

    return main


def test_command_gets_its_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    assert run(monkeypatch, capsys, seen.append) == (0, "")
    assert seen == [Settings(offset=5)]


def test_settings_may_be_chosen_by_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["made_up.py", "--workers", "0"])
    seen = []
    run_command(
        seen.append, Settings, "", lambda parse: parse(Settings(offset=parse().workers + 9, workers=7))
    )
    assert seen == [Settings(offset=9, workers=0)]


def test_an_input_error_is_one_sentence_of_three_parts_that_survives_pickling() -> None:
    error = InputError(Path("/data/x.nii"), "no such file", "give --data-dir")
    assert str(error) == "/data/x.nii: no such file; give --data-dir."
    assert str(InputError("--seed", "is odd")) == "--seed: is odd."
    again = pickle.loads(pickle.dumps(error))
    assert (again.place, again.problem, again.remedy) == ("/data/x.nii", "no such file", "give --data-dir")
    assert str(again) == str(error)


def test_bad_input_ends_with_one_sentence_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = InputError("/data/x.nii", "no such file", "give --data-dir")
    code, stderr = run(monkeypatch, capsys, raising(error))
    assert code == 2
    assert stderr == "made_up.py: error: /data/x.nii: no such file; give --data-dir.\n"


def test_ctrl_c_ends_with_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert code == 130
    assert len(stderr.strip().splitlines()) == 1
    assert "Ctrl-C" in stderr


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENOENT,
        errno.EIO,
        errno.ESTALE,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    ],
)
def test_a_place_that_cannot_be_written_ends_with_code_2_and_its_name(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "results/run/last.pt")
    code, stderr = run(monkeypatch, capsys, raising(error))
    assert code == 2
    (line,) = stderr.splitlines()
    assert "results/run/last.pt" in line
    assert os.strerror(number) in line


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), KeyError("a defect"), OSError(errno.EIO, "a defect"), RuntimeError()]
)
def test_a_defect_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as caught:
        run(monkeypatch, capsys, raising(error))
    assert caught.value is error


def test_text_that_is_not_utf_8_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], input_error: Callable
) -> None:
    code, stderr = run(monkeypatch, capsys, lambda _: print("results/case_\udcff".encode()))
    assert code == 2
    assert stderr.startswith("made_up.py: error: results/case_\\udcff: is not UTF-8 text")
    with input_error("--name 'a\\udcff'", "UTF-8"):
        check_settings(Named("a\udcff"))
    check_settings(Named("Zürich $ 東京"))


@dataclasses.dataclass(frozen=True)
class Named:
    """Settings with a name."""

    name: str


SCRIPT = '''
import dataclasses, signal
from runtime.command import run_command
from runtime.errors import InputError
from runtime.log import log

@dataclasses.dataclass(frozen=True)
class Settings:
    end: str = "well"
    """how to end"""

def main(settings):
    log.info("begun")
    if settings.end == "bad":
        raise InputError("--end bad", "not an end", "take --end well")
    if settings.end == "ctrl-c":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without
        signal.raise_signal(signal.SIGINT)

run_command(main, Settings, "A made-up command.")
'''


@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [("bad", 2, "made_up.py: error: --end bad: not an end; take --end well."), ("ctrl-c", 130, "Ctrl-C")],
)
def test_a_script_ends_without_a_traceback(end: str, code: int, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "made_up.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "made_up.py", "--end", end],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout == "begun\n"
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line


def test_command_line_is_repeated_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data-dir", "my data", "--note", "it's"]
    monkeypatch.setattr(sys, "argv", ["/some/where/train_drunet_v2.py", *arguments])
    assert command_line().startswith("python train_drunet_v2.py --data-dir 'my data' ")
    assert shlex.split(command_line()) == ["python", "train_drunet_v2.py", *arguments]
