"""The log of a run's epochs. It is kept in last.pt, as text by column, and written from there as log.csv."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from runtime.errors import InputError
from runtime.log import log
from runtime.tables import read_table, write_table

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a log.csv, none where it is missing or empty; InputError where it is no log."""
    try:
        if not path.exists() or not path.read_bytes().strip():
            return []
        table = read_table(path, dtype=str, keep_default_na=False)
        table["epoch"].astype(int)
        return _without_empty(table.to_dict("records"))
    except (OSError, ValueError, KeyError) as error:
        raise _refuse(path) from error


def write_rows(path: Path, rows: Sequence[Row]) -> pd.DataFrame:
    """Write log.csv and return it as a table of numbers; a figure that an epoch lacks is empty, and NaN."""
    table = pd.DataFrame(rows)
    write_table(path, table)
    return table.apply(pd.to_numeric)


def resume_rows(path: Path, checkpoint: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a run that goes on from a last.pt; `path` is its log.csv.

    Raises InputError where log.csv is of another run or none at all, so that it is not written over. What it
    lacks is written again with the next epoch, or at the end of the run; what it has of later epochs, which
    run again, is not kept.
    """
    found, epoch = read_rows(path), checkpoint["epoch"]
    if "log" in checkpoint:
        rows = _without_empty(checkpoint["log"])
    else:  # of a version that had the log in log.csv alone
        rows = [row for row in found if int(row["epoch"]) <= epoch]
        ends = [row.get("minutes") for row in rows if int(row["epoch"]) == epoch]
        if ends not in ([], [str(round(checkpoint["minutes"], 2))]):
            raise _refuse(path)
    own = {row["epoch"]: row for row in rows}
    earlier = [row for row in found if int(row["epoch"]) <= epoch]
    if any(row != own.get(row["epoch"]) for row in earlier):
        raise _refuse(path)
    if len(earlier) < epoch:
        log.warning("%s has %d of %d epochs; last.pt has %d", path, len(earlier), epoch, len(rows))
    return rows


def _without_empty(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    return [{name: value for name, value in row.items() if value != ""} for row in rows]


def _refuse(path: Path) -> InputError:
    return InputError(path, "is not the log of this run", "move it away, and it is written again")
