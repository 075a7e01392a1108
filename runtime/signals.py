"""SIGTERM, SIGHUP and Ctrl-C: the first lets a command finish what it is at, a second one ends it at once.

    with signals.finish_first():
        for step in steps:
            ...
            if ranks.agree_to_stop():
                save(...)
                raise signals.Stopped(is_agreed=True)

Outside such a block the first one raises `Stopped` where the program stands, and before `run_command` has
begun, while modules are imported, it ends the program at once. Every command ends with exit code
128 + signal: 130 after Ctrl-C, 143 after SIGTERM. Only the standard library is imported here, so that a
command can catch signals before the imports that take seconds.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CAUGHT = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
# torchrun passes on a signal that its ranks got from the terminal too. So near to the first it is the same.
SAME_SIGNAL_S = 3.0


class Stopped(BaseException):
    """A signal stops this command. No Exception, so that `except Exception` cannot swallow it."""

    def __init__(self, where: str = "", is_agreed: bool = False) -> None:
        super().__init__(where)
        self.number = _state.number or signal.SIGTERM
        self.where = where  # how far it got and how to go on; empty: `hint` says it
        self.is_agreed = is_agreed  # whether all ranks stop together

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it."""
        return 128 + self.number

    def __str__(self) -> str:
        where = self.where or _state.hint
        return f"stopped by {name_of(self.number)}{'; ' + where if where else ''}."


class _State:
    """What the handler knows; a module's globals would need a `global` in every function."""

    number = 0  # of the signal that came, 0 before
    since = 0.0
    has_begun = False  # whether the imports are over
    finishes_first = False
    hint = ""


_state = _State()


def catch_signals(begin: bool = False) -> None:
    """Handle signals from now on, but for those that are ignored (nohup); `begin`: the imports are over."""
    _state.has_begun = begin
    _state.finishes_first, _state.number, _state.hint = False, 0, ""
    with contextlib.suppress(ValueError):  # only the main thread of a process gets signals
        for number in CAUGHT:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _handle)


def ignore_signals() -> None:
    """Leave it to others when this process ends: for a rank that ends already."""
    for number in CAUGHT:
        signal.signal(number, signal.SIG_IGN)


def spare_worker() -> None:
    """Let a loader worker outlive the signal that its parent got too, and serve the step that is finished.

    A second SIGTERM ends it: such its parent sends at the latest when it exits.
    """
    ignore_signals()
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, lambda *_: os._exit(0)))


def release_signals() -> None:
    """Handle them as a program without this module does."""
    with contextlib.suppress(ValueError):
        for number in CAUGHT:
            if signal.getsignal(number) == _handle:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)


def is_stopping() -> bool:
    """Return whether a signal came."""
    return _state.number > 0


def stop_for(number: int) -> None:
    """Note that another rank got this signal."""
    _state.number = _state.number or number


def number() -> int:
    """Return the number of the signal that came, 0 where none did."""
    return _state.number


def hint(text: str) -> None:
    """Say this from now on where a signal stops the command: how to go on."""
    _state.hint = text


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """In this block the first signal raises nothing; the block asks `is_stopping` where it can stop."""
    _state.finishes_first = True
    try:
        yield
    finally:
        _state.finishes_first = False
    if is_stopping():
        raise Stopped


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """In this block a signal ends the process there and then: for waits that no handler interrupts."""
    caught = [number for number in CAUGHT if signal.getsignal(number) == _handle]
    for number in caught:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, _handle)


def name_of(number: int) -> str:
    """Return how a user knows a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _handle(number: int, _frame: object) -> None:
    if not _state.has_begun:
        _say(f"stopped by {name_of(number)}.")
        os._exit(128 + number)  # nothing has been written yet
    under_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if _state.number:
        if not under_torchrun or time.monotonic() - _state.since > SAME_SIGNAL_S:
            os._exit(128 + number)
        return
    _state.number, _state.since = number, time.monotonic()
    if not under_torchrun:
        for each in CAUGHT:
            if signal.getsignal(each) == _handle:
                signal.signal(each, signal.SIG_DFL)  # ends it even amid a long computation
    if not _state.finishes_first:
        raise Stopped
    _say(f"{name_of(number)}: finishing what is at hand first, a second one stops at once")


def _say(text: str) -> None:
    """Write a line past Python's streams, which may be writing; from the main rank."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{Path(sys.argv[0]).name}: {text}\n".encode(errors="replace"))
