"""CSV tables: the one place where they are written and read back.

A spreadsheet program runs a cell that begins with =, +, - or @ as a formula, and ids of cases are whatever
somebody named a folder. Such text is written with an apostrophe before it, and read without.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from runtime.files import write_atomically

# With apostrophes before it, as those of an id stay its own; the last four are = + - @ of full width.
FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
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
