"""Which scans are of one person: from the ids themselves and from the mapping sheets the organisers publish.

A row of a sheet lists the names one scan has had over the years. Names in one row, and names that say the
same patient, are joined; whatever is joined is one patient.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cohort.cases import Case
from runtime.errors import InputError
from runtime.files import file_sha256
from runtime.log import log
from runtime.tables import parse_csv

# What ids look like that no two patients share, in whatever cohort; the group is the patient. Sheets write
# TCGA ids with hyphens, slices with underscores; what follows is a date or the sample, in any form.
ID_PATTERNS = (
    (r"(TCGA_[A-Z0-9]{2}_[A-Z0-9]{4})(?:_.*)?", re.ASCII),
    (r"(BraTS-[A-Z]+-\d{5})(?:-\d{3})?", re.ASCII),
    (r"(BraTS-MEN-RT-\d{4})(?:-\d{1,3})?", re.ASCII),
    (r"(BraTS20\d\d_[A-Z]+-\d{5})(?:-\d{3})?", re.ASCII),
    (r"(BraTS2021_\d{5})", re.ASCII),
    (r"(BraTS20_(?:Training|Validation|Testing)_\d{3})", re.ASCII),
    (r"(BraTS1[5-9]_\w+?)(?:_\d)?", re.ASCII | re.IGNORECASE),  # <SITE>_<ID>_1
    (r"(UPENN-GBM-\d{5})(?:[_-]\d{1,2})?", re.ASCII),  # _11, _21: the visits
    (r"(UCSF-PDGM-\d{3,5})(?:[_-]\w+)?", re.ASCII),  # _FU001d: days to the follow-up
)
# What the ids of a cohort's own numbering look like where they say the visit; the group is the patient, who
# is one within the cohort only: another site has a sub-001 too.
_DATE = r"(?:19|20)\d\d[-_.]?(?:0\d|1[0-2])[-_.]?[0-3]\d|[0-3]?\d[-_.][0-3]?\d[-_.](?:19|20)\d\d"
_NO_NAME = r"(?:scans?|mri?|brain|head|cases?|images?|img|exam|study|patients?|subjects?|flair)"
_VISIT_WORD = (
    r"weeks?|wk|time[-_]?point|time|tp|visit|session|ses|follow[-_]?up|fu|days?|months?|mo|years?|yr"
)
_STAGE = r"baseline|bl|pre[-_]?op|post[-_]?op|pre[-_]?treatment|post[-_]?treatment|pre|post|follow[-_]?up|fu"
VISIT_PATTERNS = (
    r"(sub-[a-z0-9]+)(?:_.*)?",  # BIDS
    rf"(.*?[a-z0-9].*?)[-_. ](?:{_VISIT_WORD})[-_ ]?\d+[a-z]?(?:[-_.]\d+)?",
    rf"(.*?\d.*?)[-_. ](?:{_STAGE})",
    r"(.*?\d.*?)[-_. ](?:[tvmdw]\d{1,2}|w\d{3})",
    rf"(?!{_NO_NAME}[-_. ])(.*?[a-z0-9].*?)[-_. ](?:{_DATE})(?:[-_.]\d{{1,2}})?",
)
NUMBERED_PATIENT = re.compile(
    r"((?:patients?|pat|pt|subjects?|subj|sub|p|s)[-_ ]?\d+)[-_. ](\d{1,3}|[a-z])", re.IGNORECASE
)
NUMBERED = re.compile(r"(.*\d.*?)[-_. ](\d{1,3}|[a-z])", re.IGNORECASE)
MOST_VISITS = 8  # more ids with one beginning are a site's patients
SHEET_NAMES = re.compile(r"(?!\.).*mapping.*\.csv", re.IGNORECASE)
PATIENT_HEADER = re.compile(r"(?:patient|subject|participant)(?:id|identifier|name|number|no|code)?")
NO_VALUE = ("", "na", "n/a", "nan", "none", "null", "-")


def normalise_id(cell: str) -> str:
    """Return an id without white space, no-break spaces included, and TCGA ids in capitals, underscores."""
    text = cell.strip()
    return re.sub(r"[-. ]", "_", text).upper() if re.match(r"TCGA[-_. ]", text, re.IGNORECASE) else text


def patient_named(scan_id: str) -> str | None:
    """Return the patient whom a known kind of id names; None where it is of no known kind."""
    for pattern, flags in ID_PATTERNS:
        if match := re.fullmatch(pattern, normalise_id(scan_id), flags):
            return match[1]
    return None


def patient_of(case_id: str) -> str:
    """Return the patient a case id names, or the id itself.

    TCGA ids lose their date, BraTS-GLI ids the timepoint, BraTS19 ids the number of the scan, BIDS ids the
    session, and other ids a week, a visit or a date that they say.
    """
    if named := patient_named(case_id):
        return named
    for pattern in VISIT_PATTERNS:
        if match := re.fullmatch(pattern, case_id.strip(), re.ASCII | re.IGNORECASE):
            return match[1]
    return case_id


def share_beginnings(case_ids: Iterable[str], pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Return the ids that share what comes before a last number or letter, by that beginning.

    Ids that name a patient or a visit are left out, and so are beginnings of more than MOST_VISITS ids.
    """
    sharing: dict[str, list[str]] = defaultdict(list)
    for case_id in case_ids:
        if patient_of(case_id) == case_id and not patient_named(case_id):
            if match := pattern.fullmatch(case_id):
                sharing[match[1]].append(case_id)
            else:
                sharing[case_id].append(case_id)  # patient_7 beside patient_7_2
    return {name: sorted(ids) for name, ids in sharing.items() if 2 <= len(ids) <= MOST_VISITS}


def numbered_visits(case_ids: Sequence[str]) -> list[list[str]]:
    """Return the ids that say a patient's number and then another number, together by patient.

    In none where these patients are fewer than three or one has more than MOST_VISITS: such numbers count
    the patients of a site.
    """
    matches = [match for case_id in case_ids if (match := NUMBERED_PATIENT.fullmatch(case_id))]
    counts = Counter(match[1] for match in matches)
    if len(counts) < 3 or max(counts.values()) > MOST_VISITS:
        return []
    return list(share_beginnings(case_ids, NUMBERED_PATIENT).values())


def find_likely_visits(cases: Sequence[Case]) -> list[list[str]]:
    """Return the ids that look like visits of one patient and count as different patients, together."""
    patient = {case.case_id: case.patient_id for case in cases}
    settled = {case.case_id for case in cases if any(map(is_patient_of_sheet, case.aliases))}
    return [
        ids
        for ids in share_beginnings(patient, NUMBERED).values()
        if len({patient[case_id] for case_id in ids}) == len(ids) and not settled.issuperset(ids)
    ]


def describe_likely_visits(cases: Sequence[Case]) -> str:
    """Return in one sentence which ids look like visits of one patient; empty where none do."""
    groups = find_likely_visits(cases)
    if not groups:
        return ""
    shown = "; ".join(", ".join(ids) for ids in groups[:3]) + ("; ..." if len(groups) > 3 else "")
    return (
        f"the ids of {sum(map(len, groups))} cases look like {len(groups)} patients with several visits and "
        f"count as one patient each: {shown}; where they are visits, give --mapping a CSV file with a column "
        "of these ids and a column headed patient"
    )


def is_patient_of_sheet(alias: str) -> bool:
    """Return whether an alias is a value of a sheet's patient column, as `join_rows` writes it."""
    return re.fullmatch(r"patient .+ of [0-9a-f]{16}", alias) is not None


def names_one_patient(name: str) -> bool:
    """Return whether an id names one patient in whatever cohort: patient_001 is somebody at every site."""
    return patient_named(name) is not None or is_patient_of_sheet(name)


def find_sheets(folders: Iterable[Path]) -> list[Path]:
    """Return the mapping sheets in these folders, told by their names.

    Folders that cannot be read, such as the one above the data, are warned of.
    """
    sheets = set()
    for folder in folders:
        try:
            sheets |= {path for path in folder.iterdir() if SHEET_NAMES.fullmatch(path.name)}
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("no mapping sheet is looked for in %s: %s", folder, error.strerror)
    return sorted(path for path in sheets if path.is_file())


def read_sheet(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file, header included, cells stripped, whatever its separator and encoding.

    Raises InputError where it is missing, an Excel file, or no CSV.
    """
    if not path.is_file():
        raise InputError(f"--mapping {path}", "no such file", "give the sheet as CSV")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"not readable ({error.strerror})", "fetch it again") from error
    if content[:2] == b"PK" or path.suffix.lower() in (".xls", ".xlsx"):
        raise InputError(f"--mapping {path}", "an Excel file", "export its sheet to CSV and give that")
    return parse_csv(content, f"mapping sheet {path}", ",;\t")


def join_rows(rows: Sequence[Sequence[str]], case_ids: Iterable[str], sheet: str = "") -> list[list[str]]:
    """Return, for each row that has any, the ids it says are one person.

    Columns are told by what they hold, not by their headers: known kinds of id count anywhere, ids of other
    kinds in the column that holds most of the cohort's. A column headed patient or subject joins the rows
    of its sheet, in other cohorts too: its values count together with `sheet`, a name of the sheet's content.
    """
    known = {case_id.lower(): case_id for case_id in case_ids}
    hits: dict[int, int] = defaultdict(int)
    for row in rows:
        for column, cell in enumerate(row):
            hits[column] += cell.lower() in known
    own = max(hits, key=lambda column: hits[column], default=None)
    joined = []
    of_patients: set[int] = set()  # columns
    for row in rows:
        ids = [normalise_id(cell) for cell in row if patient_named(cell)]
        if own is not None and own < len(row) and row[own].lower() in known:
            ids.append(known[row[own].lower()])
        if not ids and not joined:  # the header, below whatever a person wrote above it
            of_patients |= {column for column, cell in enumerate(row) if is_patient_header(cell)}
        for column, cell in enumerate(row):
            if ids and column in of_patients and cell.lower() not in NO_VALUE and not patient_named(cell):
                ids.append(f"patient {cell} of {sheet}")
        if ids:
            joined.append(ids)
    return joined


def is_patient_header(cell: str) -> bool:
    """Return whether a cell heads a column of patients: Patient ID, participant_id, SubjectID, ..."""
    return PATIENT_HEADER.fullmatch(re.sub(r"[^a-z]", "", cell.lower())) is not None


def group_ids(rows: Iterable[Sequence[str]]) -> dict[str, set[str]]:
    """Return, for each id, the ids joined to it by any chain of rows, itself included."""
    group_of: dict[str, set[str]] = {}
    for ids in rows:
        merged = set(ids)
        for name in ids:
            merged |= group_of.get(name, set())
        group_of |= dict.fromkeys(merged, merged)
    return group_of


def is_sheet_about(path: Path, case_ids: Sequence[str]) -> bool:
    """Return whether a sheet names one of these cases or its patient."""
    named = {normalise_id(case_id) for case_id in case_ids} | {patient_of(case_id) for case_id in case_ids}
    found = join_rows(read_sheet(path), case_ids, file_sha256(path)[:16])
    return any(named & {*ids, *map(patient_of, ids)} for ids in found)


def map_patients(cases: Sequence[Case], sheets: Sequence[Path], given: Path | None = None) -> list[Case]:
    """Return the cases with the patient each is of and the other ids of that patient in `aliases`.

    Scans of one person get the same patient id, the first of those their ids name. Of `given`, the sheet of
    --mapping, at least one row must be about the cases; other sheets that lie about may be about others.
    """
    case_ids = [case.case_id for case in cases]
    rows: list[list[str]] = []
    for path in [*sheets, *([given] if given else [])]:
        if path == given and case_ids and not is_sheet_about(path, case_ids):
            raise InputError(
                f"--mapping {path}", f"names none of the cases, first {case_ids[0]}", "give their sheet"
            )
        found = join_rows(read_sheet(path), case_ids, file_sha256(path)[:16])
        if path == given and all(len(set(ids)) < 2 for ids in found):
            log.warning(
                "--mapping %s names %d cases and says of none who the patient is: head its column of "
                "patients: patient",
                path,
                len(found),
            )
        rows += found
    settled = {
        name for ids in rows if len(set(ids)) > 1 for name in ids
    }  # where a sheet says more than the id

    def named_by_id(case_id: str) -> str:
        return patient_named(case_id) or (case_id if case_id in settled else patient_of(case_id))

    rows += [[case_id, named_by_id(case_id)] for case_id in case_ids]
    rows += numbered_visits([case_id for case_id in case_ids if case_id not in settled])
    named_rows = [[*ids, *(patient_named(name) or name for name in ids)] for ids in rows]
    group_of = group_ids([list(map(normalise_id, ids)) for ids in named_rows])
    cases_of: dict[int, list[str]] = defaultdict(list)
    for case_id in case_ids:
        cases_of[id(group_of[normalise_id(case_id)])].append(case_id)
    mapped = []
    for case in cases:
        group = group_of[normalise_id(case.case_id)]
        patient = min(map(named_by_id, cases_of[id(group)]))
        aliases = group - {case.case_id, patient}
        mapped.append(dataclasses.replace(case, patient_id=patient, aliases=tuple(sorted(aliases))))
    return mapped
