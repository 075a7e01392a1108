"""What a program says: stdlib logging, set up once, and progress on long work.

    from runtime.log import log, progress

    for case in progress(cases, "auditing", "case"):
        log.info("%s has no tumour", case.case_id)

The main rank speaks; the others are silent. On a terminal progress is a bar; elsewhere, in a file or a pipe,
it is a line every half minute.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm

from runtime.ranks import is_main

LINE_EVERY_S = 30.0  # between two lines of progress where the output is no terminal

Item = TypeVar("Item")
log = logging.getLogger("drunet")


class _Words(logging.Formatter):
    """The message alone; warnings and errors say what they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, a name of logging
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _Terminal(logging.Handler):
    """Writes to standard output, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def start_log() -> None:
    """Send what the program says to the terminal, from the main rank."""
    close_log()
    log.setLevel(logging.INFO)
    _add(_Terminal(), _Words())


def log_to_file(path: Path) -> None:
    """Append what the program says from now on to a file too, with the time, from the main rank.

    A link of that name is replaced, and what it leads to stays as it is.
    """
    if path.is_symlink():
        path.unlink(missing_ok=True)
    _add(
        logging.FileHandler(path, encoding="utf-8", delay=True),
        _Words("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"),
    )


def close_log() -> None:
    """Take the handlers away and close their files."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def _add(handler: logging.Handler, words: logging.Formatter) -> None:
    handler.setFormatter(words)
    handler.addFilter(lambda _: is_main())
    log.addHandler(handler)


class progress(Generic[Item]):  # noqa: N801, used like tqdm
    """Go through items and show how far it is and how long it takes yet; see the module."""

    def __init__(self, items: Iterable[Item], title: str, unit: str, total: int | None = None) -> None:
        self.items = items
        self.title = title
        self.unit = unit
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.postfix = ""

    def note(self, text: str) -> None:
        """Show this text beside the count."""
        self.postfix = text

    def __iter__(self) -> Iterator[Item]:
        return self._bar() if sys.stderr.isatty() else self._lines()

    def _bar(self) -> Iterator[Item]:
        with tqdm(
            self.items,
            self.title,
            self.total,
            unit=self.unit,
            leave=False,
            disable=not is_main() or self.total == 0,
        ) as bar:
            for item in bar:
                yield item
                if self.postfix:
                    bar.set_postfix_str(self.postfix, refresh=False)

    def _lines(self) -> Iterator[Item]:
        started = spoken = time.monotonic()
        for done, item in enumerate(self.items, start=1):
            yield item
            now = time.monotonic()
            if now - spoken >= LINE_EVERY_S and done != self.total:
                spoken = now
                of, left = "", ""
                if self.total:
                    of = f" of {self.total}"
                    left = f", {(now - started) / done * (self.total - done) / 60:.1f} min left"
                postfix = f", {self.postfix}" if self.postfix else ""
                log.info("%s: %d%s %ss%s%s", self.title, done, of, self.unit, left, postfix)
