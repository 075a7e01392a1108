"""Folders walked to the end: what cannot be read is an error, not a gap, and links are followed once."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.errors import InputError
from runtime.log import log

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks and what terminals act on
NAMED_SO_BY_SYSTEMS = ("Icon\r",)  # macOS: the picture of a folder
FILE_NAME = re.compile(r"\.[A-Za-z]\w*$")  # ends as files do, so a link of this name is no lost folder


def raise_error(error: InputError) -> None:
    """Raise an error at once; what `walk_tree` reports to unless it is told otherwise."""
    raise error


def printable(path: object) -> str:
    r"""Return a path on one line: control characters as \n and the like."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(path))


def cannot_read(path: object, error: OSError) -> InputError:
    """Return the error of a file or folder that the system does not let us read."""
    return InputError(
        printable(path),
        f"cannot be read ({error.strerror or error})",
        "allow reading it, or take it out of the folder",
    )


def walk_tree(
    root: Path, report: Callable[[InputError], None] = raise_error
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, names of its folders, names of its files), sorted, for a root and all below it.

    As with os.walk, names taken out of the second are not entered. Links to folders come last, and a folder
    that is reached in two ways is entered once. A link to a folder around it is a loop and not followed.
    Reported as InputError and passed over: a folder that cannot be read, a link to nothing where it may have
    been to a folder, and a name with a control character. Hidden names may have them.
    """
    waiting, links = [root], []
    entered: set[str] = set()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        folders, files = list_folder(folder, report)
        yield folder, folders, files
        below = [folder / name for name in folders]
        waiting += [path for path in reversed(below) if not path.is_symlink()]
        links += [path for path in below if path.is_symlink() and not is_loop(path)]


def is_loop(link: Path) -> bool:
    """Return whether a link leads to a folder that it lies in; log that."""
    place = Path(os.path.realpath(link.parent))
    if Path(os.path.realpath(link)) not in (place, *place.parents):
        return False
    log.warning("%s is a link to a folder around it and not followed", printable(link))
    return True


def list_folder(folder: Path, report: Callable[[InputError], None]) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder, sorted; see `walk_tree`."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        report(cannot_read(folder, error))
        return [], []
    folders, files = [], []
    for entry in entries:
        is_hidden = entry.name.startswith(".")
        if CONTROL.search(entry.name) and not is_hidden:
            if entry.name not in NAMED_SO_BY_SYSTEMS:
                problem = "has a line break or another control character in its name"
                report(InputError(printable(entry.path), problem, "rename it"))
            continue
        (folders if is_folder(entry) else files).append(entry.name)
        if entry.is_symlink() and not is_hidden and not FILE_NAME.search(entry.name):
            check_link(Path(entry.path), report)
    return folders, files


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; False for a link that leads nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def check_link(path: Path, report: Callable[[InputError], None]) -> None:
    """Report a link that leads nowhere; where it leads to itself, log that."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            log.warning("%s is a link to itself and not followed", path)
        else:
            report(cannot_read(path, error))
