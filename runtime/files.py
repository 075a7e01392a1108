"""Files written whole or not at all, never over an input, and their hashes.

How a program knows a file that it wrote: each folder of outputs has a list `.drunet_written`, a line
`<SHA-256>  <name>` per file, as sha256sum writes it. A file is ours while its content is what the list says;
a mask that somebody has corrected by hand since is theirs.
"""

import errno
import functools
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.log import log
from runtime.plain import parse_json

MOST_JSON_BYTES = 64 << 20  # a split of a hundred thousand cases has 5 MB
WRITTEN = ".drunet_written"  # in each folder of outputs: what this program wrote there
TEMPORARY = ".drunet_temporary_"  # begins the names of files that are being written
_inputs: set[str] = set()  # real paths of the files of cases, in this process


def protect_inputs(paths: Iterable[Path]) -> None:
    """Let nothing in this process write over these files from now on, not even with --overwrite."""
    _inputs.update(map(_real_path, paths))


def _real_path(path: Path) -> str:
    """Return `os.path.realpath`; each folder is looked up once, for cohorts of many thousand files."""
    if path.is_symlink():
        return os.path.realpath(path)
    return str(_real_folder(path.absolute().parent) / path.name)


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def refuse_input(path: Path) -> None:
    """Raise InputError where a path is that of a protected file, through whatever links."""
    if os.path.realpath(path) in _inputs:
        raise InputError(
            path, "is a file of the data read, which is never written over", "choose another --output"
        )


def refuse_below_file(path: Path) -> None:
    """Raise InputError where a folder that a path lies in, or will lie in, is a file."""
    nearest = next((parent for parent in path.parents if os.path.lexists(parent)), None)
    if nearest is not None and not nearest.is_dir():
        raise InputError(nearest, "is a file, and a folder is needed there", "choose another folder")


def write_atomically(
    path: Path, write: Callable[[Path], None], before_move: Callable[[], None] | None = None
) -> None:
    """Call `write(temporary path)` and move the result to `path`; a failure leaves the old file whole.

    What is written is on the disk before it has its name, and the name before this returns: a loss of power
    leaves the old file or the new one. `before_move` is called in between. Raises InputError where `path` is
    a file of the cases read (`protect_inputs`).
    """
    refuse_input(path)
    refuse_below_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f"{TEMPORARY}{os.getpid()}_{path.name}"
    )  # the suffix stays: writers choose the format by it
    temporary.unlink(missing_ok=True)  # a link there would be written through
    try:
        write(temporary)
        _sync(temporary)
        if before_move:
            before_move()
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # has no such call for folders, and for files only where they are open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such wish
            raise
    finally:
        os.close(handle)


def restore_files(folder: Path, records: Mapping[str, bytes]) -> None:
    """Write again each file of {name: content} that is gone from a folder, and warn."""
    for name, content in records.items():
        if not (folder / name).exists():
            log.warning("%s is gone, and written again", folder / name)
            write_atomically(folder / name, lambda target, content=content: target.write_bytes(content))


def read_written(folder: Path) -> dict[str, set[str]]:
    """Return {name: SHA-256 of what this program wrote under it} of a folder; empty without a list."""
    try:
        state = (folder / WRITTEN).stat()
    except OSError:
        return {}
    return _parse_written(folder / WRITTEN, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=64)
def _parse_written(path: Path, _mtime_ns: int, _size: int) -> dict[str, set[str]]:
    written: dict[str, set[str]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(path, f"not readable ({error.strerror})", "choose another --output") from error
    for line in text.splitlines():
        digest, separator, name = line.partition("  ")
        if separator:
            written.setdefault(name, set()).add(digest)
    return written


def is_written_by_us(path: Path) -> bool:
    """Return whether a file is there and holds what this program wrote under its name."""
    digests = read_written(path.parent).get(path.name)
    return bool(digests) and path.is_file() and file_sha256(path) in digests


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise InputError where `path` may not be written: an input, or a file of somebody else.

    With `overwrite` files of others are replaced, inputs are not.
    """
    refuse_input(path)
    refuse_below_file(path)
    if os.path.lexists(path) and not overwrite and not is_written_by_us(path):
        raise InputError(
            path,
            "is there and was not written by this program, or was changed since",
            "choose another --output, or replace it with --overwrite",
        )


def write_output(path: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Write a file as `write_atomically` does where `check_output` lets it, and list it as ours."""

    def write_and_list(temporary: Path) -> None:
        write(temporary)
        line = f"{file_sha256(temporary)}  {path.name}\n"
        # before the file has its name: a program killed here leaves a line too many, not a file too few.
        # One short appended line: several ranks may write to one folder.
        append_line(path.parent / WRITTEN, line)

    check_output(path, overwrite)
    write_atomically(path, write_and_list)


def check_output_folder(folder: Path, overwrite: bool = False) -> None:
    """Raise InputError where a folder of outputs holds files and is none of ours (`mark_output_folder`).

    For commands that write many files of fixed names, such as the audit.
    """
    refuse_below_file(folder / WRITTEN)
    held = folder.iterdir() if folder.is_dir() else [folder]
    is_new = not folder.exists() or all(path.name.startswith(".drunet_") for path in held)
    if not is_new and not overwrite and not (folder / WRITTEN).is_file():
        raise InputError(
            folder,
            "holds files that this program did not write",
            "choose another --output, or write there with --overwrite",
        )


def mark_output_folder(folder: Path) -> None:
    """Mark a folder of outputs as ours."""
    folder.mkdir(parents=True, exist_ok=True)
    append_line(folder / WRITTEN, "")


def append_line(path: Path, line: str) -> None:
    """Add a line to a list in a folder of outputs; InputError where the list is a link to another file."""
    refuse_link(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def refuse_link(path: Path) -> None:
    """Raise InputError where a path is a link: what is written there would go elsewhere."""
    if path.is_symlink():
        raise InputError(path, "is a link, and nothing is written through links", "remove it")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented, with NaN and infinity refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, flag: str, what: str, kind: Any = dict[str, Any]) -> Any:
    """Return the content of a JSON file, of a type as `find_misfit` takes it.

    Raises InputError, naming the flag, if any, and what to give, where it is missing or of another type.
    """
    place = f"{flag} {path}".strip()
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise InputError(place, f"larger than {MOST_JSON_BYTES >> 20} MiB", f"give {what}")
        return parse_json(path.read_text(encoding="utf-8"), kind)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(place, f"not readable ({describe_error(error)})", f"give {what}") from error


def describe_error(error: Exception) -> str:
    """Return an error's text on one line, of an OSError without the path, which the message names."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------

LONGEST_NAME = 200  # bytes; file systems take 255, and the program adds to some names


def check_plain_name(name: str, place: str) -> None:
    """Raise InputError where a name is not that of one file or folder, on any system."""
    odd = [sign for sign in name if _is_odd(sign)]
    problem = None
    if not name.strip() or name in (".", ".."):
        problem = "is no name of a folder"
    elif odd:
        problem = f"holds {odd[0]!r}"
    elif len(os.fsencode(name)) > LONGEST_NAME:
        problem = f"is longer than {LONGEST_NAME} bytes"
    if problem:
        raise InputError(f"{place} {name[:40]!r}", problem, "give one plain name, without a path")


def _is_odd(sign: str) -> bool:
    return sign in "/\\" or unicodedata.category(sign) in ("Cc", "Zl", "Zp")  # control signs and line ends


def make_plain_name(text: str) -> str:
    """Return a name that `check_plain_name` takes, with room for more, from any text."""
    signs = ("_" if _is_odd(sign) else sign for sign in text)
    return os.fsencode("".join(signs))[: LONGEST_NAME // 2].decode("utf-8", errors="ignore") or "run"
