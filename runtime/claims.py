"""Folders that one program at a time may write to: a second one is told which has it.

A lock of the operating system holds the folder, so a program that is killed lets go of it by dying. It is a
POSIX lock (lockf) and no flock, which forked loader workers would hold on after their parent is dead.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path

from runtime.errors import InputError
from runtime.files import TEMPORARY
from runtime.log import log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".drunet_lock"
_claimed: dict[Path, tuple[int, bool]] = {}  # {folder: (file descriptor, whether the folder was made for it)}
_warned = False


class ClaimedError(InputError):
    """Another program has the folder."""


def claim_folder(folder: Path, remedy: str) -> None:
    """Take a folder, made where missing, until this program ends; remove what killed ones left half-written.

    Raises ClaimedError with `remedy` where another program has it. Where the system or the file system has no
    locks, or the folder cannot be written, this is logged once and nothing is taken.
    """
    folder = folder.absolute()
    if folder in _claimed:
        return
    is_new = not folder.exists()
    _make_folder(folder)
    if fcntl is None:
        _go_on_without(folder, "this system has no locks")
        return
    try:
        handle = _open_locked(folder / LOCK)
    except BlockingIOError:
        owner = _read_owner(folder / LOCK)
        raise ClaimedError(folder, f"another program works in it{owner}", remedy) from None
    except OSError as error:
        _go_on_without(folder, error.strerror)
        return
    _claimed[folder] = (handle, is_new)
    owner = f"process {os.getpid()} on {socket.gethostname()}, {Path(sys.argv[0]).name}"
    with contextlib.suppress(OSError):  # a full disk
        os.truncate(handle, 0)
        os.write(handle, owner.encode(errors="replace"))
    if count := sweep_temporaries(folder):
        log.info("removed %d half-written file(s) of a program that was killed in %s", count, folder)


def claim_new_folder(parent: Path, name: str, remedy: str) -> str:
    """Claim a new folder of this name, or name_2, name_3, ... where it is taken; return the name."""
    _make_folder(parent)
    count, free = 1, name
    while True:
        try:
            (parent / free).mkdir()
        except FileExistsError:
            count += 1
            free = f"{name}_{count}"
            continue
        claim_folder(parent / free, remedy)
        folder = (parent / free).absolute()
        if folder in _claimed:
            _claimed[folder] = (_claimed[folder][0], True)
        return free


def sweep_temporaries(folder: Path) -> int:
    """Remove what killed programs left half-written in a claimed folder; return how many files.

    Those of its subfolders too, but for subfolders that a program claims by itself. Only names of
    `write_atomically`.
    """
    left = list(folder.glob(f"{TEMPORARY}*"))
    left += [path for path in folder.glob(f"*/{TEMPORARY}*") if not (path.parent / LOCK).exists()]
    files = [path for path in left if path.is_file() and not path.is_symlink()]
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink()
    return len(files)


def release_claims() -> None:
    """Let go of all folders, and remove those that were made for this program and are still empty."""
    for folder, (handle, is_new) in _claimed.items():
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: see `_open_locked`
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        os.close(handle)
    _claimed.clear()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(folder, "is no folder, or lies in a file", "choose another one") from error


def _open_locked(path: Path) -> int:
    """Return the descriptor of a lock file that is now held; BlockingIOError where another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                # else the program that held it has removed it meanwhile, and the next one takes a new file
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except PermissionError as error:  # EACCES of lockf means the same as EAGAIN on some systems
            os.close(handle)
            raise BlockingIOError from error
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _read_owner(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return ""
    return f" ({' '.join(text.split())})" if text.strip() else ""


def _go_on_without(folder: Path, reason: str) -> None:
    global _warned
    if not _warned:
        log.warning("%s cannot be locked (%s): let no other program write there meanwhile", folder, reason)
    _warned = True
