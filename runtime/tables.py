"""CSV tables: the one place where they are written and read back.

A spreadsheet program runs a cell that begins with =, +, - or @ as a formula, and ids of cases are whatever
somebody named a folder. Such text is written with an apostrophe before it, and read without.
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from runtime.errors import InputError
from runtime.files import write_atomically

# With apostrophes before it, as those of an id stay its own; the last four are = + - @ of full width.
FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NOTHING = ("", "NA", "NaN", "nan", "None", "null")  # cells of a column of numbers that hold none
NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf|nan)")


def guard_cell(value: Any) -> Any:
    """Return a cell as it is written: text that a spreadsheet would run with an apostrophe before it."""
    is_formula = isinstance(value, str) and FORMULA.match(value) and not NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def unguard_cell(value: Any) -> Any:
    """Return a cell as it was before `guard_cell`."""
    is_guarded = isinstance(value, str) and value.startswith("'") and FORMULA.match(value)
    return value[1:] if is_guarded else value


def write_table(
    path: Path,
    table: pd.DataFrame,
    write: Callable[[Path, Callable[[Path], None]], None] = write_atomically,
) -> None:
    """Write a table as CSV, without its index; `write` decides whether a file may be replaced."""
    guarded = _map_text(table, guard_cell)
    # csv takes a lone carriage return for text, spreadsheets for the end of a row
    has_return = guarded.map(lambda cell: isinstance(cell, str) and "\r" in cell).to_numpy().any()
    quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL
    write(path, lambda target: guarded.to_csv(target, index=False, quoting=quoting))


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table of `write_table`; `options` are those of pandas.read_csv."""
    return _map_text(pd.read_csv(path, **options), unguard_cell)


def _map_text(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{name: table[name].map(change) for name in texts})


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
        return [[unguard_cell(cell.strip()) for cell in row] for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(place, f"not a CSV file ({_one_line(error)})", remedy) from error


def _decode(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_columns(
    path: Path, remedy: str, text: Sequence[str] = (), numbers: Sequence[str] = ()
) -> pd.DataFrame:
    """Return a CSV file that this program wrote, with these columns among others.

    Columns of `text` hold no empty cell, those of `numbers` numbers or nothing. Raises InputError, with the
    remedy, where the file is none of that.
    """
    try:
        # a case may be called NA, which pandas takes for an empty cell
        others = set(pd.read_csv(path, nrows=0, encoding="utf-8").columns) - set(text)
        nothing = {"na_values": dict.fromkeys(others, NOTHING), "keep_default_na": False}
        table = read_table(path, dtype=dict.fromkeys(text, str), encoding="utf-8", **nothing)
    except (OSError, ValueError, OverflowError) as error:  # of pandas' own errors all are ValueErrors
        raise InputError(path, f"not a readable table ({_one_line(error)})", remedy) from error
    if missing := [name for name in (*text, *numbers) if name not in table]:
        raise InputError(path, f"no column {missing[0]}", remedy)
    for name in text:
        if (table[name] == "").any():
            raise InputError(path, f"column {name} has an empty cell", remedy)
    for name in numbers:
        column = table[name]
        if not pd.api.types.is_numeric_dtype(column) or column.dtype.kind == "c" or np.isinf(column).any():
            raise InputError(path, f"column {name} holds what is no number", remedy)
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
