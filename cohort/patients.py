"""Which scans are of one person: from the ids themselves and from the mapping sheets the organisers publish.

A row of a sheet lists the names one scan has had over the years. Names in one row, and names that say the
same patient, are joined; whatever is joined is one patient.
"""

import csv
import dataclasses
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cohort.cases import Case
from runtime.errors import InputError
from runtime.files import file_sha256

# What ids look like; the group is the patient. Sheets write TCGA ids with hyphens, slices with underscores.
ID_PATTERNS = (
    (r"(TCGA_[A-Z0-9]{2}_[A-Z0-9]{4})(?:_\d{8})?", re.ASCII),
    (r"(BraTS-[A-Z]+-\d{5})(?:-\d{3})?", re.ASCII),
    (r"(BraTS2021_\d{5})", re.ASCII),
    (r"(BraTS20_(?:Training|Validation|Testing)_\d{3})", re.ASCII),
    (r"(BraTS1[5-9]_\w+?)(?:_\d)?", re.ASCII | re.IGNORECASE),  # <SITE>_<ID>_1
)
SHEET_NAMES = re.compile(r"(?!\.).*mapping.*\.csv", re.IGNORECASE)
PATIENT_HEADERS = ("patient", "patient_id", "subject", "subject_id")
NO_VALUE = ("", "na", "n/a", "nan", "none", "null", "-")


def normalise_id(cell: str) -> str:
    """Return an id without white space, no-break spaces included, and TCGA ids with underscores."""
    text = cell.strip()
    return text.replace("-", "_") if text.upper().startswith("TCGA-") else text


def patient_named(scan_id: str) -> str | None:
    """Return the patient whom a known kind of id names; None where it is of no known kind."""
    for pattern, flags in ID_PATTERNS:
        if match := re.fullmatch(pattern, normalise_id(scan_id), flags):
            return match[1]
    return None


def patient_of(case_id: str) -> str:
    """Return the patient a case id names, or the id itself.

    TCGA ids lose their date, BraTS-GLI ids the timepoint, BraTS19 ids the number of the scan.
    """
    return patient_named(case_id) or case_id


def find_sheets(folders: Iterable[Path]) -> list[Path]:
    """Return the mapping sheets in these folders, told by their names; unreadable folders have none."""
    sheets = set()
    for folder in folders:
        if os.access(folder, os.R_OK | os.X_OK):
            sheets |= {path for path in folder.iterdir() if SHEET_NAMES.fullmatch(path.name)}
    return sorted(path for path in sheets if path.is_file())


def read_sheet(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file, header included, cells stripped, whatever its separator and encoding.

    Raises InputError where it is missing or an Excel file.
    """
    if not path.is_file():
        raise InputError(f"--mapping {path}", "no such file", "give the sheet as CSV")
    content = path.read_bytes()
    if content[:2] == b"PK" or path.suffix.lower() in (".xls", ".xlsx"):
        raise InputError(f"--mapping {path}", "an Excel file", "export its sheet to CSV and give that")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=separator)]


def join_rows(rows: Sequence[Sequence[str]], case_ids: Iterable[str], sheet: str = "") -> list[list[str]]:
    """Return, for each row that has any, the ids it says are one person.

    Columns are told by what they hold, not by their headers: known kinds of id count anywhere, ids of other
    kinds in the column that holds most of the cohort's. A column headed patient or subject joins the rows
    of its sheet, in other cohorts too: its values count together with `sheet`, a name of the sheet's content.
    """
    known = set(case_ids)
    hits: dict[int, int] = defaultdict(int)
    for row in rows:
        for column, cell in enumerate(row):
            hits[column] += cell in known
    own = max(hits, key=lambda column: hits[column], default=None)
    headers = [cell.lower().replace(" ", "_") for cell in rows[0]] if rows else []
    joined = []
    for row in rows:
        ids = [normalise_id(cell) for cell in row if patient_named(cell)]
        if own is not None and own < len(row) and row[own] in known:
            ids.append(row[own])
        for header, cell in zip(headers, row, strict=False):
            if ids and header in PATIENT_HEADERS and cell.lower() not in NO_VALUE and not patient_named(cell):
                ids.append(f"patient {cell} of {sheet}")
        if ids:
            joined.append(ids)
    return joined


def group_ids(rows: Iterable[Sequence[str]]) -> dict[str, set[str]]:
    """Return, for each id, the ids joined to it by any chain of rows, itself included."""
    group_of: dict[str, set[str]] = {}
    for ids in rows:
        merged = set(ids)
        for name in ids:
            merged |= group_of.get(name, set())
        group_of |= dict.fromkeys(merged, merged)
    return group_of


def map_patients(cases: Sequence[Case], sheets: Sequence[Path], given: Path | None = None) -> list[Case]:
    """Return the cases with the patient each is of and the other ids of that patient in `aliases`.

    Scans of one person get the same patient id, the first of those their ids name. Of `given`, the sheet of
    --mapping, at least one row must be about the cases; other sheets that lie about may be about others.
    """
    case_ids = [case.case_id for case in cases]
    rows: list[list[str]] = []
    for path in [*sheets, *([given] if given else [])]:
        found = join_rows(read_sheet(path), case_ids, file_sha256(path)[:16])
        named = {normalise_id(case_id) for case_id in case_ids} | {
            patient_of(case_id) for case_id in case_ids
        }
        if path == given and case_ids and not any(named & {*ids, *map(patient_of, ids)} for ids in found):
            raise InputError(
                f"--mapping {path}", f"names none of the cases, first {case_ids[0]}", "give their sheet"
            )
        rows += found
    rows += [[case_id] for case_id in case_ids]
    named_rows = [[*ids, *(patient_named(name) or name for name in ids)] for ids in rows]
    group_of = group_ids([list(map(normalise_id, ids)) for ids in named_rows])
    cases_of: dict[int, list[str]] = defaultdict(list)
    for case_id in case_ids:
        cases_of[id(group_of[normalise_id(case_id)])].append(case_id)
    mapped = []
    for case in cases:
        group = group_of[normalise_id(case.case_id)]
        patient = min(map(patient_of, cases_of[id(group)]))
        aliases = group - {case.case_id, patient}
        mapped.append(dataclasses.replace(case, patient_id=patient, aliases=tuple(sorted(aliases))))
    return mapped
