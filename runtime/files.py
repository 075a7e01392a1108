"""Files written whole or not at all, and their hashes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)` and move the result to `path`; a failure leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{os.getpid()}.{path.name}"
    )  # the suffix stays: writers choose the format by it
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_json(path: Path, flag: str, what: str) -> dict[str, Any]:
    """Return the object in a JSON file; InputError naming the flag and what to give where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}", f"not readable ({error})", f"give {what}") from error
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}", "holds no settings", f"give {what}")
    return content
