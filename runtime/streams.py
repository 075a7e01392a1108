"""Standard output and error that end no program: closed, full, gone with the terminal, or ASCII alone."""

import contextlib
import os
import sys
from typing import Any, TextIO


class _Steady:
    """A text stream; once it cannot be written any more, what is written to it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # a closed pipe, a full disk, a terminal that is gone; a closed file
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        # Python flushes once more when it exits, into the file descriptor: that must succeed then
        with contextlib.suppress(OSError, ValueError):
            _point_to_nothing(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mend_streams() -> None:
    """Make standard output and error such streams, which also show characters they lack as escapes."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, _Steady):
            continue
        if stream is None:  # closed by the shell (>&-): the next file opened would get its number
            try:
                os.fstat(number)
            except OSError:
                _point_to_nothing(number)
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123, open to the end
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Steady(stream))


def _point_to_nothing(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
