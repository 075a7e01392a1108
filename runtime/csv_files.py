"""CSV files read whole, or refused in one sentence."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from runtime.errors import InputError


def parse_csv(content: bytes, place: object, separators: str = ",") -> list[list[str]]:
    """Return the rows of a CSV file's bytes, cells stripped.

    The separator is the one most frequent in the first line; the text is UTF-8, UTF-16 with its mark, or else
    Latin-1. Raises InputError where the bytes are no text, or quotes are not closed: the rows behind them
    would be one cell.
    """
    remedy = "give a CSV file"
    try:
        text = _decode(content)
        if "\0" in text:
            raise InputError(place, "holds bytes that are no text", remedy)
        first = text.partition("\n")[0]
        separator = max(separators, key=first.count)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return [[cell.strip() for cell in row] for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(place, f"not a CSV file ({_one_line(error)})", remedy) from error


def _decode(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_table(
    path: Path, remedy: str, text: Sequence[str] = (), numbers: Sequence[str] = ()
) -> pd.DataFrame:
    """Return a CSV file that this program wrote, with these columns among others.

    Columns of `text` hold no empty cell, those of `numbers` numbers or nothing. Raises InputError, with the
    remedy, where the file is none of that.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str), encoding="utf-8")
    except (OSError, ValueError, OverflowError) as error:  # of pandas' own errors all are ValueErrors
        raise InputError(path, f"not a readable table ({_one_line(error)})", remedy) from error
    if missing := [name for name in (*text, *numbers) if name not in table]:
        raise InputError(path, f"no column {missing[0]}", remedy)
    for name in text:
        if table[name].isna().any():
            raise InputError(path, f"column {name} has an empty cell", remedy)
    for name in numbers:
        column = table[name]
        if not pd.api.types.is_numeric_dtype(column) or column.dtype.kind == "c" or np.isinf(column).any():
            raise InputError(path, f"column {name} holds what is no number", remedy)
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
