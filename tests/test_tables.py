"""Tables: safe to open in a spreadsheet, and read back as they were."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.compare import COMPARED, KEYS, read_rows
from audit.output import COLUMNS, Output, write_table
from cohort.check import Problem, write_problems
from cohort.layouts import CaseSource, find_cases, names_of_predictions
from cohort.leakage import read_different
from cohort.patients import map_patients, read_sheet
from runtime import tables
from runtime.tables import guard_cell, unguard_cell

ROOT = Path(__file__).resolve().parents[1]
ODD_IDS = ["=HYPERLINK(A1)", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)"]
ODD_IDS += ["\t=1", "\r=1", "a\r=1,2", "'=1", "''-x", "\uff1d1"]


@pytest.mark.parametrize("name", ODD_IDS)
def test_a_cell_that_a_spreadsheet_would_run_is_written_as_text(tmp_path, name):
    path = tmp_path / "x.csv"
    tables.write_table(path, pd.DataFrame({"case": [name], "value": [-1.5]}))
    with path.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"case": name if name[0] == "a" else f"'{name}", "value": "-1.5"}
    assert tables.read_table(path, dtype={"case": str})["case"].tolist() == [name]


def test_numbers_and_plain_text_are_written_as_they_are(tmp_path):
    path = tmp_path / "x.csv"
    plain = ["BraTS2021_00001", "-1.5", "+2", "-inf", "-1e-05", "a=b", "'quoted'", ""]
    table = pd.DataFrame({"case": plain, "dice": [-0.5] * 8, "n": pd.array([None, *range(-3, 4)], "Int64")})
    tables.write_table(path, table)
    assert path.read_text() == table.to_csv(index=False)
    for values in ([], [None], [float("nan")], [True], [None, "=x"]):
        tables.write_table(path, pd.DataFrame({"a": values, "b": values}))
        assert tables.read_table(path).shape == (len(values), 2)


@given(st.text())
def test_a_guarded_cell_comes_back(text):
    assert unguard_cell(guard_cell(text)) == text
    assert guard_cell(text)[:1] not in ("=", "@", "\t", "\r")
    if guard_cell(text)[:1] in ("+", "-"):
        float(guard_cell(text))


@pytest.mark.parametrize("value", [1, -1.5, None, np.int64(-3), True])
def test_what_is_no_text_is_left_alone(value):
    assert guard_cell(value) is value
    assert unguard_cell(value) is value


def test_every_table_is_written_and_read_there():
    rooms = ("", "audit/", "cohort/", "runtime/")
    code = {path.name: path.read_text() for room in rooms for path in ROOT.glob(f"{room}*.py")}
    words = (".to_csv(", "pd.read_csv(", "csv.writer(")
    assert [name for name, text in code.items() if any(map(text.count, words))] == ["tables.py"]


def test_problems_of_an_odd_case_are_safe(tmp_path):
    write_problems(tmp_path / "check.csv", [Problem("=x", "@y/z", "error", "-odd")])
    assert (tmp_path / "check.csv").read_text().splitlines()[1] == "'=x,'@y/z,error,'-odd"
    write_problems(tmp_path / "check.csv", [])
    assert (tmp_path / "check.csv").read_text() == "case,file,severity,problem\n"


def test_masks_of_odd_cases_are_known_as_ours(tmp_path):
    row = dict.fromkeys(COLUMNS) | {
        "case": "=x",
        "region": "WT",
        "volume_ml": 1.0,
        "slices": 2,
        "mask": "=x_seg.nii.gz",
    }
    write_table(Output(tmp_path, ("WT",)), [row])
    assert (tmp_path / "volumes.csv").read_text().splitlines()[1].startswith("'=x,WT,1.0,2,")
    assert "=x_seg.nii.gz" in names_of_predictions(
        tmp_path, ["volumes.csv", "=x_seg.nii.gz", "=x_flair.nii.gz"]
    )


def test_audited_rows_of_odd_cases_join_by_their_ids(tmp_path):
    row = dict.fromkeys((*KEYS, *COMPARED, "reference_ml"), 0.5) | {
        "cohort": "internal",
        "case": "=x",
        "patient": "-p",
        "mode": "tta",
    }
    tables.write_table(
        tmp_path / "evaluation" / "metrics_per_case.csv", pd.DataFrame([row | {"seen_in_training": False}])
    )
    rows = read_rows(tmp_path)
    assert rows[["case", "patient"]].values.tolist() == [["=x", "-p"]]


def test_ids_copied_from_a_table_name_their_cases(tmp_path, make_cases, write_nifti):
    (tmp_path / "sheet.csv").write_text("id,patient\n'=a,one\n'-b,one\n")
    assert read_sheet(tmp_path / "sheet.csv")[1:] == [["=a", "one"], ["-b", "one"]]
    mapped = map_patients(make_cases([("=a", "=a"), ("-b", "-b")]), [tmp_path / "sheet.csv"])
    assert len({case.patient_id for case in mapped}) == 1
    assert read_different(tmp_path / "sheet.csv") == {
        frozenset(("id", "patient")),
        frozenset(("=a", "one")),
        frozenset(("-b", "one")),
    }
    write_nifti(tmp_path / "data" / "=a_flair.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    assert [case.case_id for case in find_cases(CaseSource(str(tmp_path / "data")))] == ["=a"]
