"""NIfTI cases: headers that disagree, damaged files, labels, orientations read and written."""

import gzip
import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes, axcodes2ornt, ornt_transform

from audit.measure import measure_case
from cohort.cache import prepare_cases
from cohort.cases import Case, load_case, save_labels
from cohort.check import check_case
from cohort.layouts import CaseSource, find_cases
from cohort.nifti import find_geometry_conflicts, measure_spacing

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
