"""Settings and command lines: a frozen dataclass per command becomes its flags.

A field's default and the docstring under it are what `--help` shows; tyro makes the command line from them.
Number types of this module carry a range, which is checked wherever settings come from: flags, a file, a
checkpoint.
"""

import contextlib
import dataclasses
import errno
import gc
import io
import itertools
import math
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cv2
import tyro

from runtime import claims, machine, signals
from runtime.errors import InputError
from runtime.exhausted import explain_exhausted
from runtime.files import check_plain_name
from runtime.log import close_log, start_log
from runtime.streams import mend_streams

Settings = TypeVar("Settings")
# Errors of a disk or a path that no code can mend; those of a path name it.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}
BAD_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EPERM}
BAD_PLACE |= {errno.EIO, errno.ESTALE, errno.ENOENT}


# ------------------------------------------------------------------------------------------------------------
# Ranges
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """What a number may be; NaN and infinity are never in a range."""

    low: float
    high: float = math.inf
    above: bool = False  # more than `low`, not `low` itself
    below: bool = False  # less than `high`, not `high` itself

    def holds(self, value: float) -> bool:
        """Return whether a value is in the range."""
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:  # a whole number beyond floats
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.above else f"{self.low} or more"
        edges = f"from {self.low} to {self.high}"
        without = [str(edge) for edge, is_out in ((self.low, self.above), (self.high, self.below)) if is_out]
        return f"{edges}, without {' and '.join(without)}" if without else edges


class Distinct:
    """Marks a setting that takes one value or more, each once."""


class Plain:
    """Marks a setting that is the name of one file or folder, without a path."""


@dataclass(frozen=True)
class Length:
    """How many values a setting takes."""

    low: int
    high: int


def _number(kind: type, allowed: Range) -> Any:
    return Annotated[kind, allowed, tyro.conf.arg(metavar=f"{kind.__name__.upper()} {allowed}")]


Count = _number(int, Range(1))  # 1, 2, ...
CountOrZero = _number(int, Range(0))  # 0, 1, 2, ...
FoldCount = _number(int, Range(2))  # 2, 3, ...
Seed = _number(int, Range(0, 2**31 - 1))
Positive = _number(float, Range(0, above=True))
NotNegative = _number(float, Range(0))
Share = _number(float, Range(0, 1))
Decay = _number(float, Range(0, 1, below=True))
PlainName = Annotated[str, Plain()]
# Far beyond what any network of this kind has: a typing error or a damaged file ends at once.
Width = _number(int, Range(1, 4096))
Side = _number(int, Range(1, 4096))
Neighbours = _number(int, Range(0, 32))
BatchSize = _number(int, Range(1, 2**16))
Processes = _number(int, Range(0, 256))


def check_settings(settings: Any, place: str | Path = "") -> None:
    """Raise InputError where a value of a settings dataclass, or of one nested in it, is out of its range.

    `place` is the file that the settings are from, which the error then names.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    types_of = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_settings(value, place)
            continue
        flag = f"{place}, {flag_of(field.name)}" if place else flag_of(field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                _check_text(flag, text)
        if not is_of_type(value, types_of[field.name]):
            shown = repr(value)
            shown = shown if len(shown) < 50 else f"{shown[:50]}..."
            raise InputError(f"{flag} {shown}", "is of a kind that the setting does not take")
        for marker in _markers(hints[field.name]):
            values = value if isinstance(value, tuple) else (value,)
            if isinstance(marker, Range):
                for number in values:
                    if number is not None and not marker.holds(number):
                        raise InputError(f"{flag} {number}", f"must be a number {marker}")
            if isinstance(marker, Plain) and value is not None:
                check_plain_name(value, flag)
            if isinstance(marker, Length) and not marker.low <= len(values) <= marker.high:
                raise InputError(flag, f"takes {marker.low} to {marker.high} values, not {len(values)}")
            if isinstance(marker, Distinct) and not values:
                raise InputError(flag, "needs a value")
            if isinstance(marker, Distinct) and len(set(values)) < len(values):
                raise InputError(f"{flag} {' '.join(values)[:50]}", "names one value twice", "name each once")


def is_of_type(value: Any, hint: Any) -> bool:
    """Return whether a value is of a setting's type; True is no number, a whole number is a float too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_type(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(is_of_type(part, arguments[0]) for part in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, (str, Path) if hint is str else hint)


def _check_text(flag: str, text: str) -> None:
    """Raise InputError where a text, such as a path, cannot be written as UTF-8: no file could name it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{flag} {text!a}", "is not UTF-8 text", "rename the file or folder") from error


def _markers(hint: Any) -> Iterator[Any]:
    """Yield the Range, Length, Distinct and Plain objects anywhere in a type."""
    for argument in typing.get_args(hint):
        if isinstance(argument, Range | Length | Distinct | Plain):
            yield argument
        yield from _markers(argument)
    for marker in getattr(hint, "__metadata__", ()):
        if isinstance(marker, Range | Length | Distinct | Plain):
            yield marker


# ------------------------------------------------------------------------------------------------------------
# Settings as plain values
# ------------------------------------------------------------------------------------------------------------


def to_plain(settings: Any) -> dict[str, Any]:
    """Return settings as one flat dictionary of plain values: nested dataclasses lose their nesting."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain |= to_plain(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return plain


def from_plain(settings_class: type[Settings], plain: Mapping[str, Any], place: str | Path = "") -> Settings:
    """Return the settings of `to_plain`; what is missing has its default, what is unknown is left out.

    Raises InputError where a value is of another kind or out of its range; it names `place`, their file.
    """
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = from_plain(hints[field.name], plain, place)
        elif field.name in plain:
            value = plain[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    settings = settings_class(**values)
    check_settings(settings, place)
    return settings


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------


def parse(
    settings_class: type[Settings],
    description: str = "",
    defaults: Settings | None = None,
    arguments: Sequence[str] | None = None,
) -> Settings:
    """Return settings from the command line (or from `arguments`); what is not typed has its default.

    A flag per field, `_` written as `-`. InputError on an unknown flag and on a value of the wrong type or
    out of its range. --help ends the program.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            settings = tyro.cli(
                settings_class,
                prog=Path(sys.argv[0]).name,
                description=description,
                default=settings_class() if defaults is None else defaults,
                args=arguments,
                config=(tyro.conf.HelptextFromCommentsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise InputError("the command line", _unbox(complaint.getvalue()), "--help lists all") from stop
        raise
    check_settings(settings)
    return settings


def _unbox(text: str) -> str:
    """Return the first paragraph of a message that tyro drew in a box, on one line."""
    lines = [line.strip("╭╮╰╯│─ ") for line in text.splitlines()]
    paragraph = itertools.takewhile(bool, lines[1:])  # under the title
    return " ".join(paragraph).rstrip(".") or " ".join(lines)


def run_command(
    main: Callable[[Any], None],
    settings_class: type[Settings],
    description: str,
    choose: Callable[[Callable[..., Settings]], Settings] | None = None,
) -> None:
    """Parse the command line, call `main(settings)` and turn bad input into one sentence and exit code 2.

    `choose` is for settings whose defaults depend on what was typed: it gets a function that parses the
    command line with the defaults it is given, and returns the settings. Ctrl-C ends with exit code 130,
    SIGTERM with 143; a full disk, and memory that is not enough, with 2. Any other exception is a defect and
    keeps its traceback.
    """
    name = Path(sys.argv[0]).name

    def parse_with(defaults: Settings | None = None) -> Settings:
        return parse(settings_class, description, defaults)

    mend_streams()
    start_log()
    machine.keep_freed_memory()
    try:
        signals.catch_signals(begin=True)
        main(choose(parse_with) if choose else parse_with())
        code = 0
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        code = 2
    except signals.Stopped as stop:
        print(f"\n{name}: {stop}", file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C.", file=sys.stderr)
        code = 130
    except UnicodeEncodeError as error:
        bad = ascii(error.object)[1:-1][:200]
        print(f"{name}: error: {bad}: is not UTF-8 text; rename the file or folder.", file=sys.stderr)
        code = 2
    except (RuntimeError, MemoryError, OSError, cv2.error) as error:
        flags = {field.name for field in dataclasses.fields(settings_class)}
        words = explain_exhausted(error, flags)
        if not words:
            if not isinstance(error, OSError) or error.errno not in (DISK_FULL | BAD_PLACE):
                raise
            if error.errno in BAD_PLACE and not error.filename:
                raise
            place = f" at {error.filename}" if error.filename else ""
            words = f"cannot write{place}: {error.strerror}; free space or choose another folder."
        print(f"{name}: error: {words}", file=sys.stderr)
        code = 2
    finally:
        signals.release_signals()
        close_log()
        claims.release_claims()
    if code:
        gc.collect()  # with the error go the loader workers that its frames hold; at exit they would wait
        sys.exit(code)


def command_line() -> str:
    """Return the command that is running, as typed, with the script's name alone."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
