"""Finding, reading and writing cases: layouts, label conventions, orientations, damaged files."""

import gzip
import itertools
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes, axcodes2ornt, ornt_transform
from PIL import Image

from audit.measure import measure_case
from cohort.cache import prepare_cases
from cohort.cases import Case, load_case, save_labels, with_reference
from cohort.check import check_case, check_cohort
from cohort.labels import labels_from_regions, regions_from_labels
from cohort.layouts import CaseSource, cases_of_files, find_cases
from cohort.nifti import find_geometry_conflicts, measure_spacing
from cohort.patients import patient_of
from cohort.phantom import is_phantom

REGIONS = ("WT", "TC", "ET")
SHAPE_XYZ = (3, 4, 5)
FLAIR = np.arange(60, dtype=np.int16).reshape(SHAPE_XYZ)  # every voxel has a value of its own
SEG = np.array([0, 1, 2, 4], np.uint8)[FLAIR % 4]
# Unequal steps, so that an exchanged axis shows in the spacing; 30, 40, 50 is off the axes of symmetry.
AFFINE_123_MM = np.array([[-1.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, 50], [0, 0, 0, 1]])
LPS_1MM = np.diag([-1.0, -1.0, 1.0, 1.0])
ORIENTATIONS = ("LPS", "RAS", "LPI", "RAI", "PSR", "SLP", "IAR", "ARS")


def in_orientation(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the same LPS image as a file of another orientation stores it."""
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    image = nib.Nifti1Image(array, affine).as_reoriented(turn)
    return np.asanyarray(image.dataobj), image.affine


def patch_header(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes of the 348-byte header of a .nii.gz file."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(raw)))


@pytest.fixture
def brats_case(tmp_path: Path, write_nifti: Callable[..., Path]) -> Callable[..., Case]:
    """Function that writes x_flair.nii.gz and x_seg.nii.gz (X, Y, Z) and returns the case found there."""

    def write(
        flair: np.ndarray = FLAIR, seg: np.ndarray | None = SEG, affine: np.ndarray = AFFINE_123_MM
    ) -> Case:
        write_nifti(tmp_path / "x" / "x_flair.nii.gz", flair, affine)
        if seg is not None:
            write_nifti(tmp_path / "x" / "x_seg.nii.gz", seg, affine)
        (case,) = find_cases(CaseSource(tmp_path))
        return case

    return write


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
# Geometry that disagrees with itself
# ------------------------------------------------------------------------------------------------------------

# The third axis leans: (0, 1.5, 2) is 2.5 mm long, but slices are 2 mm apart and a voxel has 2 x 2 x 2 mm3.
SHEARED = np.array([[-2.0, 0, 0, 30], [0, -2.0, 1.5, 40], [0, 0, 2.0, 50], [0, 0, 0, 1]])
TURN = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])


def warnings_of(case: Case) -> list[str]:
    """Return the warnings of --check, which are those that reading says, without the files' names."""
    problems = check_case(case)
    assert {problem.severity for problem in problems} <= {"warning"}
    said = [sentence.partition(": ")[2] for sentence in load_case(case).warnings]
    assert said == list(dict.fromkeys(problem.problem for problem in problems))
    return said


def test_pixdim_that_contradicts_the_affine_is_said_and_the_affine_used(brats_case):
    case = brats_case()
    path = case.modalities["flair"][0]
    patch_header(path, 80, struct.pack("<fff", 1.0, 1.0, 0.5))
    (said,) = warnings_of(case)
    assert said == (
        "its pixdim has voxels of 1 x 1 x 0.5 mm (0.5 mm3), its sform of 1 x 2 x 3 mm (6 mm3); "
        "the sform is used"
    )
    assert load_case(case).spacing_mm == (3.0, 2.0, 1.0)
    assert load_case(case).warnings == (f"flair: {said}",)


def test_a_qform_that_contradicts_the_sform_is_said_and_the_sform_used(brats_case):
    case = brats_case()
    path = case.modalities["flair"][0]
    image = nib.load(path)
    array = np.asanyarray(image.dataobj)
    shifted = AFFINE_123_MM.copy()
    shifted[0, 3] += 7
    image.header.set_qform(shifted, 1)
    nib.save(nib.Nifti1Image(array, None, image.header), path)
    assert nib.load(path).header["qform_code"] == 1
    (said,) = warnings_of(case)
    assert said == (
        "its sform [-1 0 0 30; 0 -2 0 40; 0 0 3 50] and its qform [-1 0 0 37; 0 -2 0 40; 0 0 3 50] "
        "are up to 7 mm apart; the sform is used"
    )
    assert (load_case(case).affine == AFFINE_123_MM).all()


def test_shear_is_said_and_a_voxel_has_the_volume_of_the_determinant(tmp_path, write_nifti):
    for name, array in (("flair", FLAIR), ("seg", SEG)):
        path = write_nifti(tmp_path / "x" / f"x_{name}.nii.gz", array, SHEARED)
        patch_header(path, 80, struct.pack("<fff", 2.0, 2.0, 2.5))
    (case,) = find_cases(CaseSource(tmp_path))
    (said,) = warnings_of(case)
    assert "8 mm3 by the determinant, 10 by its edges; the determinant is used" in said
    loaded = load_case(case)
    assert loaded.warnings == (f"flair, mask: {said}",)
    assert np.allclose(loaded.spacing_mm, (2, 2, 2), atol=1e-12)
    reference = loaded.labels > 0
    row = measure_case(reference, reference, loaded.spacing_mm)
    assert row["reference_ml"] == pytest.approx(np.count_nonzero(SEG) * 8 / 1000, rel=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_a_voxel_has_the_volume_of_the_determinant_whatever_the_affine(seed):
    affine = np.eye(4)
    affine[:3, :3] = np.random.default_rng(seed).normal(size=(3, 3))
    assert np.prod(measure_spacing(affine)) == pytest.approx(abs(np.linalg.det(affine[:3, :3])), rel=1e-5)


@given(
    st.tuples(*[st.floats(0.1, 10)] * 3),
    st.sampled_from(list(itertools.permutations(range(3)))),
    st.booleans(),
)
def test_without_shear_spacing_is_the_length_of_the_columns_to_the_bit(steps, order, oblique):
    affine = np.eye(4)
    affine[:3, :3] = ((TURN if oblique else np.eye(3)) @ np.diag(steps))[:, order].astype(np.float32)
    assert measure_spacing(affine) == tuple(nib.affines.voxel_sizes(affine)[::-1])


@pytest.mark.parametrize("turn", [np.eye(3), TURN])
@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (1, 0), (2, 4)])
def test_sound_headers_are_not_warned_of(tmp_path, turn, codes):
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.9375, -0.9375, 6.5])
    affine[:3, 3] = 113.7, 92.1, -61.3
    image = nib.Nifti1Image(np.zeros((240, 240, 24), np.int16), affine)
    image.header.set_qform(affine, codes[0])
    image.header.set_sform(affine, codes[1])
    path = tmp_path / "x.nii.gz"
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), path)
    assert find_geometry_conflicts(path) == []


def test_a_mask_elsewhere_in_space_is_refused_with_both_affines(brats_case, write_nifti, input_error):
    case = brats_case()
    write_nifti(case.mask[0], SEG, LPS_1MM)
    both = "[-1 0 0 0; 0 -1 0 0; 0 0 1 0] from [-1 0 0 30; 0 -2 0 40; 0 0 3 50]"
    with input_error(case.mask[0], both):
        load_case(case)


def test_runs_say_what_a_header_contradicts_whether_decoded_or_cached(brats_case, tmp_path, caplog):
    case = brats_case()
    patch_header(case.modalities["flair"][0], 80, struct.pack("<fff", 1.0, 1.0, 1.0))
    for _ in range(2):
        caplog.clear()
        prepare_cases([case], ("flair",), ("WT",), tmp_path / "cache")
        warning, too_little = [each.message for each in caplog.records if each.levelname == "WARNING"]
        assert "no slice has 64 voxels of brain" in too_little  # the case is that small
        assert warning.startswith("x: flair: its pixdim has voxels of 1 x 1 x 1 mm (1 mm3), its sform")


# ------------------------------------------------------------------------------------------------------------
# Multi-page TIF
# ------------------------------------------------------------------------------------------------------------


def write_pages(path: Path, pages: Sequence[np.ndarray], **settings: Any) -> Path:
    """Write a multi-page TIF as Pillow does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others, **settings)
    return path


@pytest.mark.parametrize(
    "settings", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"big_tiff": True}]
)
@pytest.mark.parametrize("name", ["pat1.tif", "pat1_1.tif", "pat1.TIFF"])
def test_a_multi_page_tif_is_one_case_of_all_its_pages(tmp_path, name, settings):
    write_pages(tmp_path / name, [grey(10 * z) for z in range(1, 13)], **settings)
    mask = name.replace(".", "_mask.")
    write_pages(tmp_path / mask, [grey(255 * (z == 10)) for z in range(1, 13)], **settings)
    (case,) = find_cases(CaseSource(tmp_path))
    loaded = load_case(case)
    assert (case.case_id, case.layout) == (name.split(".")[0], "slices")
    assert loaded.volume[0, :, 0, 0].tolist() == [10 * z for z in range(1, 13)]
    assert loaded.labels[:, 0, 0].tolist() == [0] * 9 + [1, 0, 0]


def test_several_multi_page_tifs_of_a_folder_are_a_case_each(tmp_path):
    for number, depth in ((1, 3), (2, 5)):
        write_pages(tmp_path / f"pat_{number}.tif", [grey(z) for z in range(depth)])
    cases = find_cases(CaseSource(tmp_path))
    assert [(case.case_id, len(load_case(case).volume[0])) for case in cases] == [("pat_1", 3), ("pat_2", 5)]


def test_multi_page_tifs_of_sixteen_bits_keep_their_values(tmp_path):
    write_pages(tmp_path / "c.tif", [grey(40000, np.uint16), grey(257, np.uint16)])
    (case,) = find_cases(CaseSource(tmp_path))
    assert load_case(case).volume[0, :, 0, 0].tolist() == [40000, 257]


@pytest.mark.parametrize(("pages", "said"), [(5, "5 pages"), (7, "7 pages"), (1, "1 page,")])
def test_a_mask_of_another_number_of_pages_is_named(tmp_path, input_error, pages, said):
    write_pages(tmp_path / "c.tif", [grey(z) for z in range(6)])
    mask = write_pages(tmp_path / "c_mask.tif", [grey(0)] * pages)
    (case,) = find_cases(CaseSource(tmp_path))
    with input_error(mask, said, "c.tif 6"):
        load_case(case)
    errors = [problem for problem in check_case(case) if problem.severity == "error"]
    assert [problem.file for problem in errors] == [str(mask)]


def test_a_mask_of_pages_for_one_picture_is_named(tmp_path, input_error, write_slices):
    write_slices(tmp_path, "c", {1: grey(1)}, suffix=".tif")
    mask = write_pages(tmp_path / "c_1_mask.tif", [grey(0)] * 3)
    with input_error(mask, "3 pages", "c_1.tif 1"):
        load_case(find_cases(CaseSource(tmp_path))[0])


def test_pages_among_single_slices_are_an_error_that_names_the_file(tmp_path, input_error, write_slices):
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2)}, suffix=".tif")
    path = write_pages(tmp_path / "c_3.tif", [grey(3), grey(4)])
    (case,) = find_cases(CaseSource(tmp_path))
    with input_error(path, "2 pages"):
        load_case(case)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_off_multi_page_tif_is_named_and_loses_no_page_in_silence(tmp_path, input_error, share):
    rng = np.random.default_rng(0)
    path = write_pages(tmp_path / "c.tif", [rng.integers(0, 255, (40, 40), np.uint8) for _ in range(6)])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    (case,) = find_cases(CaseSource(tmp_path))
    with input_error(path, "of its", "pages are readable"):
        load_case(case)


def test_the_prediction_for_a_multi_page_tif_has_its_pages(tmp_path):
    write_pages(tmp_path / "in" / "c_1.tif", [grey(z) for z in range(5)])
    (case,) = find_cases(CaseSource(tmp_path / "in"))
    labels = np.zeros((5, 4, 6), np.uint8)
    labels[3, 1:3, 2:5] = 2
    path = save_labels(labels, case, tmp_path / "out")
    assert path == tmp_path / "out" / "c_1_mask.tif"
    picture = Image.open(path)
    assert picture.n_frames == 5
    pages = []
    for number in range(5):
        picture.seek(number)
        pages.append(np.asarray(picture).copy())
    assert (np.stack(pages) == 255 * (labels > 0)).all()
    assert pages[0].dtype == np.uint8
    shutil.copy(path, tmp_path / "in")
    assert (load_case(find_cases(CaseSource(tmp_path / "in"))[0]).labels == (labels > 0)).all()


# ------------------------------------------------------------------------------------------------------------
# Finding cases, slice folders
# ------------------------------------------------------------------------------------------------------------


def grey(value: int, dtype: type = np.uint8) -> np.ndarray:
    return np.full((4, 6), value, dtype)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".PNG"])
def test_slices_are_ordered_by_number(tmp_path, write_slices, suffix):
    write_slices(
        tmp_path / "c",
        "c_7",
        {z: grey(10 * z) for z in range(1, 12)},
        {z: grey(255 * (z == 10)) for z in range(1, 12)},
        suffix,
    )
    (case,) = find_cases(CaseSource(tmp_path))
    loaded = load_case(case)
    assert case.case_id == "c_7"
    assert (case.layout, case.convention) == ("slices", "binary")
    assert loaded.volume.shape == (1, 11, 4, 6)
    assert loaded.volume.dtype == np.float32
    assert loaded.volume[0, :, 0, 0].tolist() == [10 * z for z in range(1, 12)]
    assert loaded.labels[:, 0, 0].tolist() == [0] * 9 + [1, 0]
    assert loaded.spacing_mm == (1.0, 1.0, 1.0)


def test_slices_without_masks_are_a_case_without_reference(tmp_path, write_slices):
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2)})
    (case,) = find_cases(CaseSource(tmp_path))
    assert case.mask == ()
    assert load_case(case).labels is None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_chosen_channel_of_rgb_slices_is_read(tmp_path, write_slices, suffix):
    rgb = np.stack([grey(11), grey(22), grey(33)], axis=-1)
    write_slices(tmp_path, "c", {1: rgb}, suffix=suffix)
    values = [
        load_case(find_cases(CaseSource(tmp_path, slice_channel=channel), ("flair",))[0]).volume.max()
        for channel in (0, 1, 2)
    ]
    assert values == [11, 22, 33]
    assert load_case(find_cases(CaseSource(tmp_path))[0]).volume.max() == 22


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_rgb_slices_are_t1_flair_and_t1ce_in_the_order_asked_for(tmp_path, write_slices, suffix):
    rgb = np.stack([grey(11), grey(22), grey(33)], axis=-1)
    write_slices(tmp_path, "c", {1: rgb, 2: rgb + 1}, suffix=suffix)
    (case,) = find_cases(CaseSource(tmp_path), ("t1ce", "flair", "t1"))
    assert set(case.modalities) == {"t1", "flair", "t1ce"}
    assert load_case(case, ("t1ce", "flair", "t1")).volume[..., 0, 0].tolist() == [
        [33, 34],
        [22, 23],
        [11, 12],
    ]
    assert load_case(case).volume[..., 0, 0].tolist() == [[22, 23]]


def test_rgb_pages_are_t1_flair_and_t1ce(tmp_path):
    rgb = np.stack([grey(11), grey(22), grey(33)], axis=-1)
    write_pages(tmp_path / "c.tif", [rgb, rgb + 1])
    (case,) = find_cases(CaseSource(tmp_path), ("t1", "flair", "t1ce"))
    assert load_case(case, ("t1", "flair", "t1ce")).volume[..., 0, 0].tolist() == [
        [11, 12],
        [22, 23],
        [33, 34],
    ]


def test_grey_slices_and_rgb_ones_of_another_order_offer_flair_alone(tmp_path, write_slices, input_error):
    write_slices(tmp_path / "grey", "c", {1: grey(1)})
    rgb = np.stack([grey(11), grey(22), grey(33)], axis=-1)
    write_slices(tmp_path / "rgb", "c", {1: rgb})
    assert list(find_cases(CaseSource(tmp_path / "grey"))[0].modalities) == ["flair"]
    for channel in (0, 2):  # T1 or T1ce would be FLAIR
        source = CaseSource(tmp_path / "rgb", slice_channel=channel)
        assert list(find_cases(source)[0].modalities) == ["flair"]
        with input_error(tmp_path / "rgb", "no t1", "--slice-channel"):
            find_cases(source, ("t1", "flair"))
    with input_error(tmp_path / "grey", "no t1ce", "grey slices are FLAIR"):
        find_cases(CaseSource(tmp_path / "grey"), ("flair", "t1ce"))


def test_a_grey_slice_among_rgb_ones_is_no_t1(tmp_path, write_slices, input_error):
    rgb = np.stack([grey(11), grey(22), grey(33)], axis=-1)
    write_slices(tmp_path, "c", {1: rgb, 2: grey(5)})
    (case,) = find_cases(CaseSource(tmp_path))
    assert load_case(case).volume[0, :, 0, 0].tolist() == [22, 5]
    with input_error("c_2.png", "is grey"):
        load_case(case, ("flair", "t1"))


def test_a_channel_that_is_a_copy_of_another_is_reported_and_training_warns(tmp_path, write_slices, caplog):
    flair, t1ce = np.random.default_rng(0).integers(1, 250, (2, 40, 40)).astype(np.uint8)
    mask = {1: np.full((40, 40), 255, np.uint8)}
    for case_id, t1 in (("copied", flair), ("sound", 255 - flair)):
        write_slices(tmp_path / "in", case_id, {1: np.stack([t1, flair, t1ce], axis=-1)}, mask)
    cases, problems = check_cohort(CaseSource(tmp_path / "in"), ("flair",))
    copied = "its t1 is a copy of its flair, voxel for voxel"
    assert [(found.case, found.severity, found.problem) for found in problems] == [
        ("copied", "warning", copied)
    ]
    names = ("flair", "t1", "t1ce")
    assert load_case(cases[0], names).warnings == (copied,)
    for _ in range(2):  # decoded, then found in the cache
        caplog.clear()
        prepare_cases(cases, names, ("WT",), tmp_path / "cache")
        assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
            f"copied: {copied}"
        ]


def test_alpha_is_no_channel_to_choose(tmp_path, write_slices, input_error):
    rgba = np.stack([grey(11), grey(22), grey(33), grey(255)], axis=-1)
    write_slices(tmp_path, "c", {1: rgba})
    assert load_case(find_cases(CaseSource(tmp_path, slice_channel=0), ("flair",))[0]).volume.max() == 11
    with input_error("c_1.png", "--slice-channel"):
        load_case(find_cases(CaseSource(tmp_path, slice_channel=3), ("flair",))[0])


def test_sixteen_bit_slices_keep_their_values(tmp_path, write_slices):
    write_slices(tmp_path, "c", {1: grey(40000, np.uint16), 2: grey(257, np.uint16)})
    assert load_case(find_cases(CaseSource(tmp_path))[0]).volume[0, :, 0, 0].tolist() == [40000, 257]


def test_slices_numbered_with_a_gap_are_neighbours_and_that_is_said(tmp_path, write_slices, caplog):
    write_slices(tmp_path / "c", "c", {z: grey(z) for z in (1, 2, 10)})
    (case,) = find_cases(CaseSource(tmp_path))
    assert load_case(case).volume[0, :, 0, 0].tolist() == [1, 2, 10]
    assert "gaps" in caplog.text
    assert "c, without slice 3" in caplog.text


def test_slice_number_that_occurs_twice_is_an_error(tmp_path, write_slices, input_error):
    write_slices(tmp_path, "c", {1: grey(1)})
    write_slices(tmp_path, "c", {1: grey(1)}, suffix=".tif")
    with input_error("c_1", "twice"):
        find_cases(CaseSource(tmp_path))


def test_slice_without_mask_among_others_with_one_is_named(tmp_path, write_slices, input_error):
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2), 3: grey(3)}, {1: grey(0), 3: grey(0)})
    with input_error("c_2.png"):
        find_cases(CaseSource(tmp_path))


def test_mask_without_its_slice_is_named(tmp_path, write_slices, input_error):
    # The last slice of a case is missing; its mask tells.
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2)}, {1: grey(0), 2: grey(0), 3: grey(255)})
    with input_error("3"):
        find_cases(CaseSource(tmp_path))


def test_slices_of_unequal_size_are_named(tmp_path, write_slices, input_error):
    write_slices(tmp_path, "c", {1: grey(1), 2: np.zeros((5, 6), np.uint8)})
    with input_error("c_2.png"):
        load_case(find_cases(CaseSource(tmp_path))[0])


def test_unreadable_slice_is_named(tmp_path, write_slices, input_error):
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2)})
    (tmp_path / "c_2.png").write_bytes(b"not a picture")
    with input_error("c_2.png"):
        load_case(find_cases(CaseSource(tmp_path))[0])


@pytest.mark.parametrize("value", [1, 255])
def test_picture_masks_may_hold_one_or_255(tmp_path, write_slices, value):
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2)}, {1: grey(0), 2: grey(value)})
    labels = load_case(find_cases(CaseSource(tmp_path))[0]).labels
    assert labels.dtype == np.uint8
    assert labels[:, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_coloured_picture_mask_is_a_mask_whatever_its_colour(tmp_path, write_slices, channel):
    mask = np.zeros((4, 6, 3), np.uint8)
    mask[1, 2, channel] = 255
    write_slices(tmp_path, "c", {1: grey(1)}, {1: mask})
    labels = load_case(find_cases(CaseSource(tmp_path))[0]).labels
    assert np.argwhere(labels).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("value", [2, 128, 254])
def test_unknown_value_in_a_picture_mask_is_named_with_its_file(tmp_path, write_slices, input_error, value):
    write_slices(tmp_path, "c", {1: grey(1), 2: grey(2)}, {1: grey(255), 2: grey(value)})
    with input_error("c_2_mask.png", str(value)):
        load_case(find_cases(CaseSource(tmp_path))[0])


def test_picture_mask_of_another_shape_is_named(tmp_path, write_slices, input_error):
    write_slices(tmp_path, "c", {1: grey(1)}, {1: np.zeros((6, 4), np.uint8)})
    with input_error("c_1_mask.png", "(1, 6, 4)", "(1, 4, 6)"):
        load_case(find_cases(CaseSource(tmp_path))[0])


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
        write_slices(tmp_path / case_id, case_id, {1: grey(1)})
    assert {case.patient_id for case in find_cases(CaseSource(tmp_path))} == {"TCGA_CS_4942"}


def test_phantoms_are_told_from_other_cases(phantom_cohort, brats_case, tmp_path, write_slices):
    assert all(is_phantom(case) for case in find_cases(CaseSource(phantom_cohort)))
    assert not is_phantom(brats_case())
    write_slices(tmp_path / "slices", "c", {1: grey(1)})
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
# Damaged and unsuitable NIfTI files
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.95])
def test_truncated_nii_gz_is_named(brats_case, input_error, kept):
    noise = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)  # hardly compresses
    case = brats_case(noise, None)
    path = case.modalities["flair"][0]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with input_error(path):
        load_case(case)


def test_truncated_nii_is_named(tmp_path, write_nifti, input_error):
    path = write_nifti(tmp_path / "x_flair.nii", FLAIR)
    path.write_bytes(path.read_bytes()[:-20])
    with input_error(path):
        load_case(find_cases(CaseSource(tmp_path))[0])


def test_damaged_bytes_in_the_middle_are_named(brats_case, input_error):
    noise = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)
    case = brats_case(noise, None)
    path = case.modalities["flair"][0]
    content = bytearray(path.read_bytes())
    for index in range(8000, 8100):
        content[index] ^= 0xFF
    path.write_bytes(content)
    with input_error(path):
        load_case(case)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>" * 50, gzip.compress(b"x" * 5000)], ids=["html", "gz"]
)
def test_file_that_is_no_nifti_is_named(brats_case, input_error, content):
    case = brats_case(seg=None)
    path = case.modalities["flair"][0]
    path.write_bytes(content)
    with input_error(path):
        load_case(case)


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (70, struct.pack("<h", 9999)),  # datatype
        (42, struct.pack("<h", -3)),  # size of the first axis
        (280, bytes(48)),  # affine
        (280, struct.pack("<f", float("nan")) * 12),
    ],
    ids=["unknown type", "negative size", "affine of zeros", "affine of NaN"],
)
def test_header_that_makes_no_sense_is_named(brats_case, input_error, offset, content):
    case = brats_case(seg=None)
    path = case.modalities["flair"][0]
    patch_header(path, offset, content)
    with input_error(path):
        load_case(case)


def test_colour_nifti_is_named(tmp_path, write_nifti, input_error):
    colours = np.zeros(SHAPE_XYZ, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    path = write_nifti(tmp_path / "x_flair.nii.gz", colours)
    with input_error(path):
        load_case(find_cases(CaseSource(tmp_path))[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxel_that_is_no_number_is_named(brats_case, input_error, value):
    flair = FLAIR.astype(np.float32)
    flair[1, 2, 3] = value
    case = brats_case(flair)
    with input_error(case.modalities["flair"][0], "NaN"):
        load_case(case)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5, 2), (60,)])
def test_file_that_is_no_volume_is_named(brats_case, input_error, shape):
    case = brats_case(np.zeros(shape, np.int16), None)
    with input_error(case.modalities["flair"][0]):
        load_case(case)


def test_fourth_axis_of_one_is_dropped(brats_case):
    loaded = load_case(brats_case(FLAIR[..., None], SEG[..., None]))
    assert (loaded.volume[0] == FLAIR.transpose(2, 1, 0)).all()
    assert (loaded.labels == SEG.transpose(2, 1, 0)).all()


def test_modality_of_another_shape_is_named(tmp_path, write_nifti, input_error):
    write_nifti(tmp_path / "x_flair.nii.gz", FLAIR)
    path = write_nifti(tmp_path / "x_t1.nii.gz", FLAIR[:2])
    (case,) = find_cases(CaseSource(tmp_path))
    with input_error(path, "(5, 4, 2)", "(5, 4, 3)"):
        load_case(case, ("flair", "t1"))


def test_mask_of_another_shape_is_named(brats_case, input_error):
    case = brats_case(seg=SEG[:, :3])
    with input_error(case.mask[0]):
        load_case(case)


@pytest.mark.parametrize(
    "affine",
    [np.diag([1.0, 2.0, 3.0, 1.0]), AFFINE_123_MM @ np.diag([1.0, 1.0, 0.5, 1.0])],
    ids=["mirrored by its header", "another spacing"],
)
def test_mask_that_lies_elsewhere_than_the_flair_is_named(brats_case, write_nifti, input_error, affine):
    # The first mask would be turned against the FLAIR without a word, and every Dice with it.
    case = brats_case()
    write_nifti(case.mask[0], SEG, affine)
    with input_error(case.mask[0]):
        load_case(case)


def test_file_deleted_since_it_was_found_is_named(brats_case, input_error):
    case = brats_case()
    case.modalities["flair"][0].unlink()
    with input_error(case.modalities["flair"][0]):
        load_case(case)


# ------------------------------------------------------------------------------------------------------------
# Labels
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_masks_of_any_number_type_give_the_same_labels(brats_case, dtype):
    labels = load_case(brats_case(seg=SEG.astype(dtype))).labels
    assert labels.dtype == np.uint8
    assert (labels == SEG.transpose(2, 1, 0)).all()


@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        (np.uint8, 3, "3"),
        (np.int16, -1, "-1"),
        (np.float32, 1.5, "1.5"),
        (np.float32, np.nan, "nan"),
        (np.uint16, 258, "258"),  # 2 if it were cut to a byte first
    ],
)
def test_unknown_label_is_named_with_its_file(brats_case, input_error, dtype, value, shown):
    seg = SEG.astype(dtype)
    seg[2, 3, 4] = value
    case = brats_case(seg=seg)
    with input_error(case.mask[0], f"label {shown}"):
        load_case(case)


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


# ------------------------------------------------------------------------------------------------------------
# Orientation and geometry, read and written
# ------------------------------------------------------------------------------------------------------------


def world_of_values(array_xyz: np.ndarray, affine: np.ndarray) -> dict[int, tuple[float, ...]]:
    """Return where in the world, in mm, each value of an array lies; an oracle that knows no orientation."""
    return {
        int(array_xyz[index]): tuple(np.round(affine @ [*index, 1.0], 3))
        for index in itertools.product(*map(range, array_xyz.shape))
    }


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_volume_reads_the_same_from_files_of_any_orientation(brats_case, codes):
    flair, affine = in_orientation(FLAIR, AFFINE_123_MM, codes)
    seg, _ = in_orientation(SEG, AFFINE_123_MM, codes)
    assert "".join(aff2axcodes(affine)) == codes  # the file is what the test says it is
    loaded = load_case(brats_case(flair, seg, affine))
    assert (loaded.volume[0] == FLAIR.transpose(2, 1, 0)).all()
    assert (loaded.labels == SEG.transpose(2, 1, 0)).all()
    np.testing.assert_allclose(loaded.affine, AFFINE_123_MM, atol=1e-5)
    np.testing.assert_allclose(loaded.spacing_mm, (3.0, 2.0, 1.0), atol=1e-5)
    assert all(type(step) is float for step in loaded.spacing_mm)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_voxel_keeps_its_place_in_the_world(brats_case, codes):
    flair, affine = in_orientation(FLAIR, AFFINE_123_MM, codes)
    loaded = load_case(brats_case(flair, None, affine))
    assert world_of_values(loaded.volume[0].transpose(2, 1, 0), loaded.affine) == world_of_values(
        flair, affine
    )


def test_depth_runs_up_height_back_and_width_to_the_left_of_the_patient(brats_case):
    flair, affine = in_orientation(FLAIR, AFFINE_123_MM, "IAR")
    loaded = load_case(brats_case(flair, None, affine))
    origin, up = (loaded.affine @ [*index, 1.0] for index in ((0, 0, 0), (0, 0, 1)))
    back, left = (loaded.affine @ [*index, 1.0] for index in ((0, 1, 0), (1, 0, 0)))
    # NIfTI's world axes run to the right, the front and the top.
    assert (up - origin)[:3].round(5).tolist() == [0, 0, 3]
    assert (back - origin)[:3].round(5).tolist() == [0, -2, 0]
    assert (left - origin)[:3].round(5).tolist() == [-1, 0, 0]


def test_an_oblique_volume_takes_the_nearest_axes_and_keeps_its_spacing(brats_case):
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    flair, affine = in_orientation(FLAIR, AFFINE_123_MM, "PSR")
    loaded = load_case(brats_case(flair, None, turn @ affine))
    assert (loaded.volume[0] == FLAIR.transpose(2, 1, 0)).all()
    np.testing.assert_allclose(loaded.spacing_mm, (3.0, 2.0, 1.0), atol=1e-4)


def test_modalities_and_mask_of_different_orientations_are_brought_together(tmp_path, write_nifti):
    for name, array, codes in (("flair", FLAIR, "LPS"), ("t1", FLAIR, "RAS"), ("seg", SEG, "PSR")):
        write_nifti(tmp_path / f"x_{name}.nii.gz", *in_orientation(array, AFFINE_123_MM, codes))
    loaded = load_case(find_cases(CaseSource(tmp_path))[0], ("flair", "t1"))
    assert (loaded.volume[0] == loaded.volume[1]).all()
    assert (loaded.labels == SEG.transpose(2, 1, 0)).all()


def test_modalities_come_in_the_order_asked_for(tmp_path, write_nifti):
    for value, name in enumerate(("flair", "t1", "t1ce", "t2")):
        write_nifti(tmp_path / f"x_{name}.nii.gz", np.full(SHAPE_XYZ, value, np.int16))
    (case,) = find_cases(CaseSource(tmp_path))
    assert load_case(case, ("t2", "flair", "t1ce")).volume[:, 0, 0, 0].tolist() == [3, 0, 2]


def test_intensities_are_those_the_header_scales_to(brats_case):
    case = brats_case(seg=None)
    patch_header(case.modalities["flair"][0], 112, struct.pack("<ff", 2.0, -5.0))  # slope, intercept
    assert (load_case(case).volume[0] == 2.0 * FLAIR.transpose(2, 1, 0) - 5.0).all()


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_saved_labels_lie_in_the_file_as_the_flair_does(brats_case, tmp_path, codes):
    flair, affine = in_orientation(FLAIR, AFFINE_123_MM, codes)
    seg, _ = in_orientation(SEG, AFFINE_123_MM, codes)
    case = brats_case(flair, seg, affine)
    patch_header(case.modalities["flair"][0], 148, b"scanner 7")  # descrip
    patch_header(case.modalities["flair"][0], 252, struct.pack("<hh", 1, 3))  # qform and sform code
    patch_header(case.modalities["flair"][0], 123, bytes([2]))  # mm
    path = save_labels(load_case(case).labels, case, tmp_path / "out")
    assert path == tmp_path / "out" / "x_seg.nii.gz"
    written, source = nib.load(path), nib.load(case.modalities["flair"][0])
    assert written.shape == source.shape
    assert written.get_data_dtype() == np.uint8
    assert (np.asanyarray(written.dataobj) == seg).all()
    np.testing.assert_array_equal(written.affine, source.affine)
    assert source.header["descrip"].item() == b"scanner 7"
    for field in ("pixdim", "xyzt_units", "sform_code", "qform_code", "srow_x", "quatern_b", "descrip"):
        assert written.header[field].tobytes() == source.header[field].tobytes(), field


@given(codes=st.sampled_from(ORIENTATIONS), seed=st.integers(0, 1000))
def test_saving_and_loading_labels_gives_them_back(tmp_path_factory, codes, seed):
    folder = tmp_path_factory.mktemp("roundtrip")
    labels = np.random.default_rng(seed).choice([0, 1, 2, 4], (5, 4, 3)).astype(np.uint8)
    flair, affine = in_orientation(FLAIR, AFFINE_123_MM, codes)
    nib.save(nib.Nifti1Image(flair, affine), folder / "x_flair.nii.gz")
    save_labels(labels, find_cases(CaseSource(folder))[0], folder)
    assert (load_case(find_cases(CaseSource(folder))[0]).labels == labels).all()


def test_saved_labels_are_not_scaled_by_the_flairs_header(brats_case, tmp_path):
    case = brats_case()
    labels = load_case(case).labels
    patch_header(case.modalities["flair"][0], 112, struct.pack("<ff", 2.0, -5.0))
    patch_header(case.modalities["flair"][0], 124, struct.pack("<ff", 900.0, 100.0))  # cal_max, cal_min
    written = nib.load(save_labels(labels, case, tmp_path / "out"))
    assert (np.asanyarray(written.dataobj) == SEG).all()
    assert np.asanyarray(written.dataobj).dtype == np.uint8
    assert (written.header["cal_min"], written.header["cal_max"]) == (0, 0)


def test_picture_cases_get_picture_masks_under_their_own_numbers(tmp_path, write_slices):
    write_slices(tmp_path / "in", "c", {z: grey(z) for z in range(8, 12)}, suffix=".tif")
    (case,) = find_cases(CaseSource(tmp_path / "in"))
    labels = np.zeros((4, 4, 6), np.uint8)
    labels[2, 1:3, 2:5] = 2  # the third slice is number 10
    folder = save_labels(labels, case, tmp_path / "out")
    assert folder == tmp_path / "out" / "c"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"c_{z}_mask.png" for z in range(8, 12))
    write_slices(folder, "c", {z: grey(z) for z in range(8, 12)})
    restored = load_case(find_cases(CaseSource(folder))[0]).labels
    assert (restored == (labels > 0)).all()
    picture = np.asarray(Image.open(folder / "c_10_mask.png"))
    assert np.unique(picture).tolist() == [0, 255]


def test_a_write_that_fails_leaves_the_old_mask_and_no_debris(brats_case, tmp_path, monkeypatch):
    case = brats_case()
    path = save_labels(load_case(case).labels, case, tmp_path / "out")
    before = path.read_bytes()

    def fail(_image: nib.Nifti1Image, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_labels(np.zeros((5, 4, 3), np.uint8), case, tmp_path / "out")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
