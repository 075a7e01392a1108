"""Patients from ids and mapping sheets: who is joined, who is not, and where sheets are found."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cohort.cases import Case
from cohort.layouts import CaseSource, find_cases
from cohort.patients import (
    describe_likely_visits,
    find_sheets,
    group_ids,
    map_patients,
    patient_named,
    patient_of,
)
from cohort.split import SPLIT_PARTS, split_cases

# Header and cells as the organisers write them: a no-break space ends the last header, NA stands for nothing.
SHEET_2021 = (
    "BraTS2021,Data Collection,Site No (represents the originating institution),BraTS2020,BraTS2019,"
    "BraTS2018,BraTS2017\N{NO-BREAK SPACE}\n"
    "BraTS2021_00000,TCGA-GBM,1,BraTS20_Training_001,BraTS19_CBICA_AAB_1,"
    "Brats18_CBICA_AAB_1,Brats17_CBICA_AAB_1\n"
    "BraTS2021_00002,UCSF-PDGM,2,NA,NA,NA,NA\n"
    "BraTS2021_00003,UCSF-PDGM,2,NA,NA,NA,NA\N{NO-BREAK SPACE}\n"
)
SHEET_2020 = (
    "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID,"
    "BraTS_2020_subject_ID\n"
    "LGG,Brats17_TCIA_101_1,Brats18_TCIA09_101_1,TCGA-CS-4942,BraTS19_TCIA09_101_1,BraTS20_Training_300\n"
    "HGG,NA,NA,NA,NA,BraTS20_Training_301\n"
)
SHEET_2023 = (
    "BraTS2023;BraTS2021;Segmentation (1=test);Local ID\n"
    "BraTS-GLI-00002-000;BraTS2021_00002;0;7\n"
    "BraTS-GLI-00002-001;BraTS2021_00003;0;7\n"
    "BraTS-GLI-00005-000;BraTS2021_00005;0;7\n"
)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def cohort(tmp_path: Path, write_nifti: Callable[..., Path]) -> Callable[..., list[Case]]:
    """Function that writes cases of these ids below a folder and finds them, with a mapping if need be."""

    def make(ids: Sequence[str], folder: str = "BraTS/data", mapping: Path | None = None) -> list[Case]:
        for case_id in ids:
            joint = "-t2f" if "-GLI-" in case_id else "_flair"
            write_nifti(tmp_path / folder / case_id / f"{case_id}{joint}.nii", np.zeros((2, 2, 2), np.uint8))
        return find_cases(CaseSource(tmp_path / folder, mapping=mapping))

    return make


IDS_2021 = ("BraTS2021_00000", "BraTS2021_00002", "BraTS2021_00003", "BraTS2021_00005")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("place", ["BraTS/data", "BraTS", "BraTS/data/nested"])
def test_a_sheet_beside_the_cases_names_their_other_ids(tmp_path, cohort, encoding, place):
    write(tmp_path / place / "BraTS21-17_Mapping.csv", SHEET_2021, encoding)
    first, *others = cohort(IDS_2021)
    assert first.aliases == (
        "BraTS19_CBICA_AAB",
        "BraTS19_CBICA_AAB_1",
        "BraTS20_Training_001",
        "Brats17_CBICA_AAB",
        "Brats17_CBICA_AAB_1",
        "Brats18_CBICA_AAB",
        "Brats18_CBICA_AAB_1",
    )
    assert [case.patient_id for case in (first, *others)] == list(IDS_2021)  # NA joins nobody
    assert all(case.aliases == () for case in others)


def test_a_sheet_two_levels_above_is_not_looked_for(tmp_path, cohort):
    write(tmp_path / "BraTS21-17_Mapping.csv", SHEET_2021)
    assert cohort(IDS_2021)[0].aliases == ()


def test_a_2019_case_is_known_by_its_2021_scan(tmp_path, cohort):
    write(tmp_path / "BraTS" / "BraTS21-17_Mapping.csv", SHEET_2021)
    seen = {name for case in cohort(IDS_2021) for name in case.aliases}
    first, second = cohort(["BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAG_1"], "other/2019")
    assert {first.case_id, first.patient_id} <= seen
    assert not {second.case_id, second.patient_id, *second.aliases} & seen


def test_a_2020_case_is_known_as_the_tcga_patient_of_the_picture_slices(tmp_path, cohort, write_slices):
    write(tmp_path / "BraTS" / "data" / "name_mapping.csv", SHEET_2020)
    first, second = cohort(["BraTS20_Training_300", "BraTS20_Training_301"])
    case_id = "TCGA_CS_4942_19970222"
    write_slices(tmp_path / "lgg" / "kaggle" / case_id, case_id, {1: np.zeros((2, 2), np.uint8)})
    (slices,) = find_cases(CaseSource(tmp_path / "lgg" / "kaggle"))
    assert slices.patient_id == "TCGA_CS_4942"
    assert {slices.case_id, slices.patient_id, *slices.aliases} & set(first.aliases) == {"TCGA_CS_4942"}
    assert "TCGA_CS_4942" not in second.aliases


def test_the_2023_sheet_makes_two_2021_scans_one_patient_and_the_split_keeps_them_together(tmp_path, cohort):
    sheet = write(tmp_path / "sheets" / "gli.csv", SHEET_2023)
    cases = cohort([*IDS_2021, *(f"BraTS2021_0001{n}" for n in range(4))], mapping=sheet)
    by_id = {case.case_id: case.patient_id for case in cases}
    assert by_id["BraTS2021_00002"] == by_id["BraTS2021_00003"]
    assert len(set(by_id.values())) == 7
    assert by_id["BraTS2021_00005"] == "BraTS2021_00005"  # the same local ID 7 is no evidence
    for seed in range(10):
        split = split_cases(cases, seed)
        places = [{by_id[case_id] for case_id in split[part]} for part in SPLIT_PARTS]
        assert sum(map(len, places)) == 7


def test_the_order_of_columns_and_their_headers_do_not_matter(tmp_path, cohort):
    rows = [line.split(";") for line in SHEET_2023.splitlines()]
    shuffled = "\n".join("\t".join((row[1], row[3], row[0])) for row in [["?"] * 4, *rows[1:]])
    cases = cohort(IDS_2021, mapping=write(tmp_path / "x.csv", shuffled))
    assert [case.patient_id for case in cases][1:3] == ["BraTS2021_00002"] * 2


def test_a_sheet_of_ones_own_joins_scans_by_its_patient_column(tmp_path, cohort):
    text = "Scan,Age,Patient ID\n17,51,p1\n18,18,p1\n19,17,p2\n20,60,n/a\n21,61,n/a\n"
    cases = cohort(["17", "18", "19", "20", "21"], mapping=write(tmp_path / "own.csv", text))
    assert [case.patient_id for case in cases] == ["17", "17", "19", "20", "21"]
    aliases = [[name for name in case.aliases if not name.startswith("patient ")] for case in cases]
    assert aliases == [["18"], [], [], [], []]


@pytest.mark.parametrize(
    "sheet",
    [
        "PatientID,Scan\nX1,scan_a\nX1,scan_b\n",
        "participant_id;Scan\nX1;scan_a\nX1;scan_b\n",
        "Scan,Subject-Id\nscan_a,X1\nscan_b,X1\n",
        "made on Monday,\nScan,Patient ID\nscan_a,X1\nscan_b,X1\n",  # a comment above
        "Scan,patient\nSCAN_A,X1\nScan_b,X1\n",
    ],
)
def test_a_patient_column_is_known_by_what_people_call_it(tmp_path, cohort, sheet):
    cases = cohort(["scan_a", "scan_b", "scan_c"], mapping=write(tmp_path / "own.csv", sheet))
    first, second, other = (case.patient_id for case in cases)
    assert first == second != other


def test_a_given_sheet_that_joins_nobody_is_warned_of(tmp_path, cohort, caplog):
    cohort(["scan_a", "scan_b"], mapping=write(tmp_path / "own.csv", "Scan,who\nscan_a,X1\nscan_b,X1\n"))
    assert "own.csv names 2 cases and says of none who the patient is" in caplog.text
    caplog.clear()
    cohort(["scan_a", "scan_b"], mapping=write(tmp_path / "two.csv", "Scan,patient\nscan_a,X1\nscan_b,X2\n"))
    assert not caplog.text


def test_a_patient_column_joins_scans_of_two_cohorts(tmp_path, cohort):
    sheet = write(tmp_path / "own.csv", "scan,patient\nh19_1,P7\nh21_5,P7\nh21_6,P8\n")
    (old,) = cohort(["h19_1"], "old", sheet)
    new = cohort(["h21_5", "h21_6"], "new", sheet)
    assert len(old.aliases) == 1
    assert old.aliases[0].startswith("patient P7 of ")
    assert [old.aliases[0] in case.aliases for case in new] == [True, False]


def test_a_given_sheet_must_be_about_the_cases(tmp_path, cohort, input_error):
    sheet = write(tmp_path / "other.csv", SHEET_2020)
    with input_error("--mapping", sheet, "BraTS2021_00000"):
        cohort(IDS_2021, mapping=sheet)
    with input_error("--mapping", "nowhere.csv"):
        cohort(IDS_2021, mapping=tmp_path / "nowhere.csv")
    excel = tmp_path / "gli.csv"
    excel.write_bytes(b"PK\x03\x04 and so on")
    with input_error("--mapping", excel, "CSV"):
        cohort(IDS_2021, mapping=excel)


def test_sheets_are_told_by_their_names(tmp_path):
    names = ["name_mapping.csv", "BraTS2023_GLI_Mapping.csv", "name_mapping_validation_data.csv"]
    for name in [*names, "survival_info.csv", "mapping.xlsx", "._name_mapping.csv"]:
        write(tmp_path / name, "x")
    assert find_sheets([tmp_path, tmp_path / "nowhere"]) == [tmp_path / name for name in sorted(names)]


def test_two_timepoints_are_one_patient_without_any_sheet(cohort):
    cases = cohort(["BraTS-GLI-00002-000", "BraTS-GLI-00002-001", "BraTS-GLI-00003-000"])
    assert [case.patient_id for case in cases] == ["BraTS-GLI-00002"] * 2 + ["BraTS-GLI-00003"]


@pytest.mark.parametrize(
    ("scan_id", "patient"),
    [
        ("BraTS19_2013_10_1", "BraTS19_2013_10"),
        ("Brats18_TCIA09_101_1", "Brats18_TCIA09_101"),
        ("TCGA-CS-4942", "TCGA_CS_4942"),
        ("BraTS-MEN-00004-000", "BraTS-MEN-00004"),
        ("BraTS2021_00000\N{NO-BREAK SPACE}", "BraTS2021_00000"),
        ("TCGA-CS-4942_1997-02-22", "TCGA_CS_4942"),
        ("TCGA_CS_4942_1997.02.22", "TCGA_CS_4942"),
        ("TCGA-CS-4942-19970222", "TCGA_CS_4942"),
        ("UPENN-GBM-00001_11", "UPENN-GBM-00001"),
        ("UCSF-PDGM-0004_FU001d", "UCSF-PDGM-0004"),
        ("UCSF-PDGM-0004", "UCSF-PDGM-0004"),
        ("BraTS2024_SSA-00002-000", "BraTS2024_SSA-00002"),
        ("sub-001_ses-02", None),  # a patient of its cohort only: another site has a sub-001 too
        ("patient_001", None),
        ("NA", None),
        ("TCGA-GBM", None),  # a data collection, not a patient
        ("HGG", None),
        ("", None),
    ],
)
def test_patient_named_by_an_id(scan_id, patient):
    assert patient_named(scan_id) == patient


@given(st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=4), max_size=12))
def test_groups_are_the_connected_components(rows):
    named = [[str(number) for number in row] for row in rows]
    found = group_ids(named)
    edges = np.array([(row[0], other) for row in rows for other in row]).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(edges)), edges.T), shape=(16, 16))
    _, component = connected_components(graph, directed=False)
    for name, group in found.items():
        assert group == {other for other in found if component[int(other)] == component[int(name)]}


def test_mapping_changes_nothing_but_patients_and_aliases(tmp_path, make_cases):
    cases = make_cases([("BraTS2021_00000", "?"), ("BraTS2021_00002", "?")])
    mapped = map_patients(cases, [write(tmp_path / "mapping.csv", SHEET_2021)])
    assert [dataclasses.replace(case, patient_id="?", aliases=()) for case in mapped] == cases


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("sub-001", "sub-001"),
        ("sub-001_ses-02", "sub-001"),
        ("Patient-001_week-044", "Patient-001"),
        ("Patient-001_week-000-1", "Patient-001"),
        ("PatientID_0003_Timepoint_1", "PatientID_0003"),
        ("Patient-001_t1", "Patient-001"),
        ("P07_tp2", "P07"),
        ("AAB_visit2", "AAB"),
        ("P07_baseline", "P07"),
        ("P07_2020-01-31", "P07"),
        ("P07_01.31.2020", "P07"),
        ("Smith_20200131", "Smith"),
        ("scan_20200131", "scan_20200131"),  # the date is all that the id says
        ("patient_001", "patient_001"),
        ("site1_001", "site1_001"),
        ("week-044", "week-044"),
        ("t1", "t1"),
        ("BRATS_001", "BRATS_001"),
    ],
)
def test_the_patient_of_an_id_that_says_a_visit(case_id, patient):
    assert patient_of(case_id) == patient


def patients_of(make_cases, *ids):
    mapped = map_patients(make_cases([(case_id, "?") for case_id in ids]), [])
    return [case.patient_id for case in mapped], describe_likely_visits(mapped)


@pytest.mark.parametrize(
    "style", ["sub-{:03}_ses-0{}", "UPENN-GBM-{:05}_{}1", "P{:02}_week-{}", "pat_{:03}_{}"]
)
def test_visits_of_one_patient_never_part_in_a_split(make_cases, style):
    ids = [style.format(patient, visit) for patient in range(1, 9) for visit in (1, 2)]
    mapped = map_patients(make_cases([(case_id, "?") for case_id in ids]), [])
    assert len({case.patient_id for case in mapped}) == 8
    for seed in range(10):
        split = split_cases(mapped, seed)
        places = [{case_id[:-2] for case_id in split[part]} for part in SPLIT_PARTS]
        assert sum(map(len, places)) == len(set.union(*places))
    assert describe_likely_visits(mapped) == ""


def test_patients_numbered_within_a_site_stay_apart(make_cases):
    ids = [f"patient_{site}_{number:03}" for site in (1, 2, 3) for number in range(1, 21)]
    patients, warning = patients_of(make_cases, *ids)
    assert patients == ids
    assert warning == ""
    ids = [f"patient_{number:03}" for number in range(1, 9)]
    assert patients_of(make_cases, *ids) == (ids, "")
    ids = [f"BraTS2021_0000{number}" for number in range(1, 4)]
    assert patients_of(make_cases, *ids) == (ids, "")


def test_ids_that_may_be_visits_are_named_with_the_remedy(make_cases):
    patients, warning = patients_of(make_cases, "h19_1", "h19_2", "h20_1")
    assert patients == ["h19_1", "h19_2", "h20_1"]
    assert all(word in warning for word in ("h19_1, h19_2", "--mapping", "patient"))
    assert "h20" not in warning
    assert "A7, A7_2" in patients_of(make_cases, "A7", "A7_2", "B8")[1]


def test_a_sheet_decides_which_visits_are_of_one_patient(tmp_path, cohort):
    sheet = write(
        tmp_path / "own.csv", "scan,patient\nh19_1,A\nh19_2,A\nh20_1,B\nh20_2,C\nx1_t1,D\nx1_t2,E\n"
    )
    cases = cohort(["h19_1", "h19_2", "h20_1", "h20_2", "x1_t1", "x1_t2"], mapping=sheet)
    assert [case.patient_id for case in cases] == ["h19_1", "h19_1", "h20_1", "h20_2", "x1_t1", "x1_t2"]
    assert describe_likely_visits(cases) == ""
