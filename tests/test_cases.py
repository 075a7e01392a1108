"""Finding cases: the BraTS layout, single files, ids, label conventions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cohort.cases import load_case, with_reference
from cohort.labels import labels_from_regions, regions_from_labels
from cohort.layouts import CaseSource, cases_of_files, find_cases
from cohort.patients import patient_of
from cohort.phantom import is_phantom

REGIONS = ("WT", "TC", "ET")
SHAPE_XYZ = (3, 4, 5)
FLAIR = np.arange(60, dtype=np.int16).reshape(SHAPE_XYZ)  # every voxel has a value of its own
SEG = np.array([0, 1, 2, 4], np.uint8)[FLAIR % 4]


# ------------------------------------------------------------------------------------------------------------
# Finding cases, BraTS 2021 layout
# ------------------------------------------------------------------------------------------------------------


def test_brats_cases_are_found_below_nested_roots_sorted_by_id(tmp_path, write_nifti):
    root = tmp_path / "BraTS2021" / "BraTS2021"
    for case_id in ("BraTS2021_00010", "BraTS2021_00002"):
        for modality in ("t2", "flair", "t1ce", "t1", "seg"):
            write_nifti(root / case_id / f"{case_id}_{modality}.nii.gz", FLAIR)
    cases = find_cases(CaseSource(tmp_path / "BraTS2021"), ("flair", "t1", "t1ce", "t2"))
    assert [case.case_id for case in cases] == ["BraTS2021_00002", "BraTS2021_00010"]
    first = cases[0]
    folder = root / "BraTS2021_00002"
    assert first.modalities == {
        name: (folder / f"BraTS2021_00002_{name}.nii.gz",) for name in ("flair", "t1", "t1ce", "t2")
    }
    assert first.mask == (folder / "BraTS2021_00002_seg.nii.gz",)
    assert (first.patient_id, first.cohort) == ("BraTS2021_00002", "BraTS2021")
    assert (first.layout, first.convention) == ("brats2021", "brats")


def test_uncompressed_files_and_cases_without_a_mask_are_found(tmp_path, write_nifti):
    write_nifti(tmp_path / "a" / "a_flair.nii", FLAIR)
    write_nifti(tmp_path / "b" / "b_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "b" / "b_seg.nii", SEG)
    first, second = find_cases(CaseSource(tmp_path))
    assert first.mask == ()
    assert load_case(first).labels is None
    assert second.mask == (tmp_path / "b" / "b_seg.nii",)
    assert with_reference([first, second], tmp_path) == [second]


def test_cases_are_sorted_by_id_whatever_their_folders_are_called(tmp_path, write_nifti, write_slices):
    write_nifti(tmp_path / "a" / "z_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "b" / "m_flair.nii.gz", FLAIR)
    write_slices(tmp_path / "k", "k", {1: np.zeros((4, 4), np.uint8)})
    assert [case.case_id for case in find_cases(CaseSource(tmp_path))] == ["k", "m", "z"]


def test_several_cases_may_share_one_folder(tmp_path, write_nifti):
    for case_id in ("p_1", "p_2"):  # ids may hold underscores
        write_nifti(tmp_path / f"{case_id}_flair.nii.gz", FLAIR)
    assert [case.case_id for case in find_cases(CaseSource(tmp_path))] == ["p_1", "p_2"]


def test_temporary_files_of_a_killed_writer_are_no_cases(tmp_path, write_nifti, write_slices):
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "x" / ".123.x_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "x" / "._x_flair.nii.gz", FLAIR)  # macOS leaves these on foreign disks
    write_slices(tmp_path / "y", "y", {1: np.zeros((4, 4), np.uint8)})
    write_slices(tmp_path / "y", ".123.y", {1: np.zeros((4, 4), np.uint8)})
    assert [case.case_id for case in find_cases(CaseSource(tmp_path))] == ["x", "y"]


def test_hidden_folders_are_not_searched(tmp_path, write_nifti):
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / ".123.y" / "y_flair.nii.gz", FLAIR)
    assert [case.case_id for case in find_cases(CaseSource(tmp_path))] == ["x"]


def test_folder_that_does_not_exist_is_named(tmp_path, input_error):
    with input_error(tmp_path / "nowhere"):
        find_cases(CaseSource(tmp_path / "nowhere"))


def test_folder_without_cases_is_named(tmp_path, input_error):
    (tmp_path / "notes.txt").write_text("x_flair")
    with input_error(tmp_path):
        find_cases(CaseSource(tmp_path))


@pytest.mark.parametrize("present", ["t1", "seg"])
def test_case_without_the_modality_is_named(tmp_path, write_nifti, input_error, present):
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "y" / f"y_{present}.nii.gz", FLAIR)
    with input_error(tmp_path / "y", "case y", "flair"):
        find_cases(CaseSource(tmp_path))


def test_modality_asked_for_must_be_there_and_others_need_not(tmp_path, write_nifti, input_error):
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    assert len(find_cases(CaseSource(tmp_path), ("flair",))) == 1
    with input_error("case x", "t1ce"):
        find_cases(CaseSource(tmp_path), ("flair", "t1ce"))


def test_one_id_in_two_folders_is_an_error(tmp_path, write_nifti, input_error):
    write_nifti(tmp_path / "a" / "x_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "b" / "x_flair.nii.gz", FLAIR)
    with input_error(tmp_path, "case x", f"in {tmp_path / 'a'} and in {tmp_path / 'b'}"):
        find_cases(CaseSource(tmp_path))


def test_one_modality_both_as_nii_and_nii_gz_is_an_error(tmp_path, write_nifti, input_error):
    # Which of the two is read would be left to the order the file system lists them in.
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    write_nifti(tmp_path / "x" / "x_flair.nii", FLAIR + 1)
    with input_error("x"):
        find_cases(CaseSource(tmp_path))


def test_cohort_without_any_mask_cannot_be_trained_on(tmp_path, write_nifti, input_error):
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    with input_error(tmp_path):
        with_reference(find_cases(CaseSource(tmp_path)), tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Ids
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("TCGA_CS_4942_19970222", "TCGA_CS_4942"),
        ("TCGA_HT_A5RC_19990831", "TCGA_HT_A5RC"),
        ("BraTS-GLI-00005-100", "BraTS-GLI-00005"),
        ("BraTS2021_00495", "BraTS2021_00495"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB"),
        ("TCGA_CS_4942_1997", "TCGA_CS_4942"),  # a date in any form, a year alone too
    ],
)
def test_patient_of_a_case_id(case_id, patient):
    assert patient_of(case_id) == patient


def test_two_scans_of_one_patient_get_one_patient_id(tmp_path, write_slices):
    for case_id in ("TCGA_CS_4942_19970222", "TCGA_CS_4942_19980101"):
        write_slices(tmp_path / case_id, case_id, {1: np.ones((4, 6), np.uint8)})
    assert {case.patient_id for case in find_cases(CaseSource(tmp_path))} == {"TCGA_CS_4942"}


def test_phantoms_are_told_from_other_cases(phantom_cohort, tmp_path, write_nifti, write_slices):
    assert all(is_phantom(case) for case in find_cases(CaseSource(phantom_cohort)))
    write_nifti(tmp_path / "x" / "x_flair.nii.gz", FLAIR)
    assert not is_phantom(find_cases(CaseSource(tmp_path / "x"))[0])
    write_slices(tmp_path / "slices", "c", {1: np.ones((4, 6), np.uint8)})
    assert not is_phantom(find_cases(CaseSource(tmp_path / "slices"))[0])


def test_single_files_become_cases_named_by_the_file(tmp_path, write_nifti):
    paths = [
        write_nifti(tmp_path / "x_flair.nii.gz", FLAIR),
        write_nifti(tmp_path / "BraTS-GLI-00005-100.nii", FLAIR),
    ]
    first, second = cases_of_files(paths, ("flair",))
    assert (first.case_id, first.patient_id) == ("x", "x")
    assert (second.case_id, second.patient_id) == ("BraTS-GLI-00005-100", "BraTS-GLI-00005")
    assert first.modalities == {"flair": (paths[0],)}
    assert first.mask == ()
    assert (load_case(first).volume[0] == FLAIR.transpose(2, 1, 0)).all()


def test_single_files_suit_a_network_of_one_modality_alone(tmp_path, input_error):
    with input_error("x.nii.gz", "t1ce"):
        cases_of_files([tmp_path / "x.nii.gz"], ("flair", "t1ce"))
    with input_error("x.png"):
        cases_of_files([tmp_path / "x.png"], ("flair",))


# ------------------------------------------------------------------------------------------------------------
# Labels
# ------------------------------------------------------------------------------------------------------------


def test_regions_of_brats_labels_by_hand():
    labels = np.array([[[0, 1, 2, 4]]], np.uint8)
    regions = regions_from_labels(labels, "brats", REGIONS)
    assert regions.dtype == np.bool_
    assert regions[:, 0, 0].tolist() == [
        [False, True, True, True],  # WT: core, edema and enhancing
        [False, True, False, True],  # TC: core and enhancing
        [False, False, False, True],  # ET
    ]
    assert (regions_from_labels(labels, "brats", ("ET", "WT")) == regions[[2, 0]]).all()


def test_binary_masks_hold_the_whole_tumour_alone(input_error):
    labels = np.array([[[0, 1]]], np.uint8)
    assert regions_from_labels(labels, "binary", ("WT",)).tolist() == [[[[False, True]]]]
    with input_error("--regions", "ET"):
        regions_from_labels(labels, "binary", ("WT", "ET"))


LABELS = st.lists(st.sampled_from([0, 1, 2, 4]), min_size=1, max_size=24).map(
    lambda values: np.array(values, np.uint8).reshape(1, 1, -1)
)


@given(labels=LABELS, regions=st.permutations(REGIONS))
def test_labels_from_regions_undoes_regions_from_labels(labels, regions):
    restored = labels_from_regions(regions_from_labels(labels, "brats", regions), regions)
    assert restored.dtype == np.uint8
    assert restored.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("regions", "expected"),
    [(("WT",), [0, 2, 2, 2]), (("TC",), [0, 1, 0, 1]), (("ET", "WT"), [0, 2, 2, 4])],
)
def test_labels_of_fewer_regions_by_hand(regions, expected):
    labels = np.array([[[0, 1, 2, 4]]], np.uint8)
    restored = labels_from_regions(regions_from_labels(labels, "brats", regions), regions)
    assert restored[0, 0].tolist() == expected
