"""One phantom through every layout and quirk: the same regions and the same normalised volumes come out."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image

from cohort.cache import prepare_cases
from cohort.cases import MODALITIES, load_case, save_labels
from cohort.labels import LABEL_CONVENTIONS, labels_from_regions, regions_from_labels
from cohort.layouts import LAYOUTS, CaseSource, cases_of_files, find_cases, find_cases_of_run, log_cases
from cohort.nifti import unwrap_int16
from cohort.preprocess import normalise_volume
from runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
REGIONS = ("WT", "TC", "ET")
SHAPE = (6, 9, 8)  # D, H, W
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, 50], [0, 0, 0, 1]])
VOLUMES = {  # small enough for uint8 pictures, background 0 at the borders
    name: np.pad(np.random.default_rng(seed).integers(50, 250, (6, 7, 6)), ((0, 0), (1, 1), (1, 1)))
    for seed, name in enumerate(MODALITIES)
}
TISSUES = np.zeros(SHAPE, np.uint8)  # 0 background, 1 core, 2 edema, 3 enhancing, 4 cavity
TISSUES[1:5, 2:7, 2:7] = 2
TISSUES[2:4, 3:6, 3:6] = 3
TISSUES[2:4, 4, 4] = 1
EXPECTED = np.stack([np.isin(TISSUES, values) for values in ((1, 2, 3), (1, 3), (3,))])
# The file's values of core, edema, enhancing and cavity.
VALUES = {"brats": (1, 2, 4, 0), "brats2023": (1, 2, 3, 0), "brats2024": (1, 2, 3, 4), "msd": (2, 1, 3, 0)}
IDS = {
    "brats2019": "BraTS19_CBICA_AAB_1",
    "brats2020": "BraTS20_Training_355",
    "brats2021": "BraTS2021_00002",
    "brats2023": "BraTS-GLI-00005-000",
    "brats2024": "BraTS-GLI-00005-100",
    "msd": "BRATS_001",
}
HYPHENS = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}
OBLIQUE = np.eye(4)
OBLIQUE[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]


def file_labels(convention: str, tissues: np.ndarray = TISSUES) -> np.ndarray:
    return np.array([0, *VALUES[convention]], np.uint8)[tissues]


def write(path: Path, array: np.ndarray, codes: str = "LPS", affine: np.ndarray = AFFINE) -> Path:
    """Write (D, H, W) or (V, D, H, W) as a file of another orientation."""
    xyz = array.transpose(2, 1, 0) if array.ndim == 3 else array.transpose(3, 2, 1, 0)
    image = nib.Nifti1Image(xyz, affine)
    if codes != "LPS":
        image = image.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_layout(
    root: Path,
    layout: str,
    case_id: str | None = None,
    seg: np.ndarray | None = None,
    masked: bool = True,
    codes: str = "LPS",
    affine: np.ndarray = AFFINE,
    suffix: str = ".nii.gz",
) -> Path:
    """Write the phantom as a case of a layout and return the folder of its files."""
    case_id = case_id or IDS[layout]
    if masked and seg is None:
        seg = file_labels(LAYOUTS[layout].convention)
    volumes = {name: volume.astype(np.int16) for name, volume in VOLUMES.items()}
    if layout == "msd":
        stack = np.stack([volumes[name] for name in ("flair", "t1", "t1ce", "t2")])
        write(root / "imagesTr" / f"{case_id}{suffix}", stack, codes, affine)
        if masked:
            write(root / "labelsTr" / f"{case_id}{suffix}", seg, codes, affine)
        return root / "imagesTr"
    folder = root / "HGG" / case_id if layout == "brats2019" else root / case_id
    for name, volume in (volumes | ({"seg": seg} if masked else {})).items():
        joined = f"-{HYPHENS[name]}" if layout in ("brats2023", "brats2024") else f"_{name}"
        path = folder / f"{case_id}{joined}{suffix}"
        if name == "seg" and layout == "brats2020" and case_id.endswith("355"):
            path = folder / "W39_1998.09.19_Segm.nii"
        write(path, volume, codes, affine)
    return folder


# ------------------------------------------------------------------------------------------------------------
# The same case in every layout
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize(
    ("codes", "affine"),
    [("LPS", AFFINE), ("RAS", AFFINE), ("PSR", AFFINE), ("LPI", AFFINE), ("ARS", OBLIQUE @ AFFINE)],
    ids=["LPS", "RAS", "PSR", "LPI", "oblique ARS"],
)
@pytest.mark.parametrize("layout", IDS)
def test_the_phantom_is_the_same_in_every_layout(tmp_path, layout, codes, affine, suffix):
    write_layout(
        tmp_path / "Data" / "Data", layout, codes=codes, affine=affine, suffix=suffix
    )  # nested twice
    (case,) = find_cases(CaseSource(tmp_path), MODALITIES)
    assert (case.case_id, case.layout, case.convention) == (IDS[layout], layout, LAYOUTS[layout].convention)
    loaded = load_case(case, MODALITIES)
    expected = np.stack([VOLUMES[name] for name in MODALITIES]).astype(np.float32)
    assert (loaded.volume == expected).all()
    assert (regions_from_labels(loaded.labels, case.convention, REGIONS) == EXPECTED).all()
    np.testing.assert_allclose(loaded.spacing_mm, (3.0, 2.0, 1.0), atol=1e-4)
    for ours, theirs in zip(normalise_volume(loaded.volume), normalise_volume(expected), strict=True):
        assert (ours == theirs).all()


@pytest.mark.parametrize("kind", ["grey.png", "rgb.tif"])
def test_the_phantom_is_the_same_as_picture_slices(tmp_path, write_slices, kind):
    if kind == "rgb.tif":  # kaggle_3m: T1, FLAIR, T1ce
        pixels = np.stack([VOLUMES[name] for name in ("t1", "flair", "t1ce")], axis=-1).astype(np.uint8)
    else:
        pixels = VOLUMES["flair"].astype(np.uint8)
    masks = EXPECTED[0].astype(np.uint8) * 255
    many = range(8, 8 + SHAPE[0])  # 9 before 10: as text 10 would come first
    case_id = "TCGA_CS_4942_19970222"
    write_slices(
        tmp_path / case_id,
        case_id,
        dict(zip(many, pixels, strict=True)),
        dict(zip(many, masks, strict=True)),
        kind[-4:],
    )
    (case,) = find_cases(CaseSource(tmp_path))
    loaded = load_case(case)
    assert (case.layout, case.convention, case.patient_id) == ("slices", "binary", "TCGA_CS_4942")
    assert (loaded.volume[0] == VOLUMES["flair"]).all()
    assert (regions_from_labels(loaded.labels, "binary", ("WT",)) == EXPECTED[:1]).all()
    expected = normalise_volume(VOLUMES["flair"][None].astype(np.float32))[0]
    assert (normalise_volume(loaded.volume)[0] == expected).all()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR"])
@pytest.mark.parametrize("layout", IDS)
def test_masks_are_written_in_the_labels_and_orientation_of_the_case(tmp_path, layout, codes):
    folder = write_layout(tmp_path / "in", layout, codes=codes)
    (case,) = find_cases(CaseSource(tmp_path / "in"))
    path = save_labels(labels_from_regions(EXPECTED, REGIONS, case.convention), case, tmp_path / "out")
    assert path.name == IDS[layout] + ("-" if "GLI" in IDS[layout] else "_") + "seg.nii.gz"
    written, reference = nib.load(path), nib.load(case.mask[0])
    assert written.shape == reference.shape  # three axes, for MSD too
    assert (np.asanyarray(written.dataobj) == np.asanyarray(reference.dataobj)).all()
    np.testing.assert_allclose(written.affine, reference.affine)
    if layout != "msd":
        case.mask[0].unlink()
        shutil.copy(path, folder)
        (again,) = find_cases(CaseSource(tmp_path / "in"))
        regions = regions_from_labels(load_case(again).labels, again.convention, REGIONS)
        assert (regions == EXPECTED).all()


@given(
    convention=st.sampled_from(sorted(VALUES)),
    tissues=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    regions=st.permutations(REGIONS),
)
def test_regions_survive_any_convention(convention, tissues, regions):
    tissues = np.array(tissues, np.uint8).reshape(1, 1, -1)
    expected = np.stack(
        [np.isin(tissues, {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}[region]) for region in regions]
    )
    found = regions_from_labels(file_labels(convention, tissues), convention, regions)
    assert (found == expected).all()
    written = labels_from_regions(found, regions, convention)
    assert (regions_from_labels(written, convention, regions) == expected).all()
    assert (written[tissues == 4] == 0).all()  # a cavity is never predicted


def test_a_network_of_the_core_alone_marks_picture_slices(tmp_path, write_slices):
    write_slices(tmp_path, "c", dict(enumerate(VOLUMES["flair"].astype(np.uint8))))
    (case,) = find_cases(CaseSource(tmp_path))
    folder = save_labels(labels_from_regions(EXPECTED[1:2], ("TC",), "binary"), case, tmp_path / "out")
    picture = np.asarray(Image.open(folder / "c_2_mask.png"))
    assert (picture == EXPECTED[1, 2] * 255).all()


# ------------------------------------------------------------------------------------------------------------
# What lies in the folders
# ------------------------------------------------------------------------------------------------------------


def test_every_layout_may_lie_below_one_root_and_each_gets_its_line(tmp_path, caplog):
    caplog.set_level("INFO", "drunet")
    for layout in IDS:
        write_layout(tmp_path / layout, layout)
    write_layout(tmp_path / "validation", "brats2021", "BraTS2021_00001", masked=False)
    write_layout(tmp_path / "brats2023", "brats2023", "BraTS-GLI-00005-001")
    cases = find_cases(CaseSource(tmp_path), MODALITIES)
    log_cases(cases)
    assert caplog.messages == [
        "BraTS 2019: 1 case, 1 with masks, 4 modalities",
        "BraTS 2020: 1 case, 1 with masks, 4 modalities",
        "BraTS 2021: 2 cases, 1 with masks, 4 modalities",
        "BraTS 2023: 2 cases, 2 with masks, 4 modalities, 1 patients",
        "BraTS 2024: 1 case, 1 with masks, 4 modalities",
        "MSD Task01: 1 case, 1 with masks, 4 modalities",
    ]
    assert [case.case_id for case in find_cases(CaseSource(tmp_path, layout="msd"))] == ["BRATS_001"]
    assert [case.case_id for case in find_cases(CaseSource(tmp_path, layout="brats2019"))] != []


def test_what_else_lies_in_a_download_does_not_disturb(tmp_path, write_nifti):
    write_layout(tmp_path, "msd")
    write_layout(tmp_path, "msd", "BRATS_002", masked=False)
    (tmp_path / "imagesTs").mkdir()
    shutil.copy(tmp_path / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "imagesTs" / "BRATS_485.nii.gz")
    shutil.copy(tmp_path / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "imagesTr" / "._BRATS_001.nii.gz")
    write_nifti(tmp_path / "imagesTr" / "BRATS_003_0000.nii.gz", VOLUMES["t1"].astype(np.int16))
    (tmp_path / "dataset.json").write_text('{"name": "of another program"}')
    for name in ("name_mapping.csv", "survival_info.csv", "BraTS21-17_Mapping.csv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    cases = find_cases(CaseSource(tmp_path))
    assert [(case.case_id, bool(case.mask)) for case in cases] == [
        ("BRATS_001", True),
        ("BRATS_002", False),
        ("BRATS_485", False),
    ]


def test_only_the_misnamed_mask_of_a_maskless_2020_case_is_taken(tmp_path):
    folder = write_layout(tmp_path, "brats2020")
    (case,) = find_cases(CaseSource(tmp_path))
    assert case.mask == (folder / "W39_1998.09.19_Segm.nii",)
    shutil.copy(case.mask[0], folder / "BraTS20_Training_355_seg.nii")
    (case,) = find_cases(CaseSource(tmp_path))
    assert case.mask == (folder / "BraTS20_Training_355_seg.nii",)


def test_a_layout_that_is_not_there_is_named(tmp_path, input_error):
    write_layout(tmp_path, "brats2021")
    with input_error(tmp_path, "brats2023", "--layout auto"):
        find_cases(CaseSource(tmp_path, layout="brats2023"))


def test_ids_of_no_known_kind_can_be_given_a_layout(tmp_path):
    write_layout(tmp_path, "brats2023", "ours-1", seg=file_labels("brats2024", np.full(SHAPE, 4, np.uint8)))
    (case,) = find_cases(CaseSource(tmp_path, layout="brats2024"))
    assert not regions_from_labels(load_case(case).labels, case.convention, REGIONS).any()


def test_case_without_a_modality_is_named(tmp_path, input_error):
    folder = write_layout(tmp_path, "brats2023")
    (folder / "BraTS-GLI-00005-000-t1c.nii.gz").unlink()
    assert len(find_cases(CaseSource(tmp_path), ("flair", "t2"))) == 1
    with input_error(folder, "BraTS-GLI-00005-000", "t1ce"):
        find_cases(CaseSource(tmp_path), MODALITIES)


def test_an_msd_file_that_is_no_stack_of_four_is_named(tmp_path, input_error):
    write_layout(tmp_path, "msd")
    path = write(tmp_path / "imagesTr" / "BRATS_001.nii.gz", VOLUMES["flair"].astype(np.int16))
    with input_error(path, "(8, 9, 6)"):
        load_case(find_cases(CaseSource(tmp_path))[0], ("flair",))


def test_single_files_keep_the_labels_of_their_layout(tmp_path):
    folder = write_layout(tmp_path, "brats2023")
    msd = write_layout(tmp_path, "msd") / "BRATS_001.nii.gz"
    (case,) = cases_of_files([folder / "BraTS-GLI-00005-000-t1c.nii.gz"], ("t1ce",))
    assert (case.case_id, case.convention, case.mask) == ("BraTS-GLI-00005-000", "brats2023", ())
    assert (load_case(case, ("t1ce",)).volume[0] == VOLUMES["t1ce"]).all()
    (case,) = cases_of_files([msd], ("t2",))
    assert (case.case_id, case.convention) == ("BRATS_001", "msd")
    assert (load_case(case, ("t2",)).volume[0] == VOLUMES["t2"]).all()


# ------------------------------------------------------------------------------------------------------------
# Label conventions: the cohort decides
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "convention"), [("brats2021", "brats2023"), ("brats2023", "brats")])
def test_a_cohort_in_the_other_ones_labels_is_recognised(tmp_path, layout, convention, caplog):
    ids = [f"{IDS[layout][:-3]}{number:03d}" for number in range(3)]
    for case_id in ids:
        write_layout(tmp_path, layout, case_id, file_labels(convention))
    no_enhancing = np.where(TISSUES == 3, 1, TISSUES)
    write_layout(tmp_path, layout, IDS[layout][:-3] + "009", file_labels(convention, no_enhancing))
    cases = find_cases(CaseSource(tmp_path))
    assert {case.convention for case in cases} == {convention}
    for case in cases[:3]:
        regions = regions_from_labels(load_case(case).labels, case.convention, REGIONS)
        assert (regions == EXPECTED).all()
    caplog.set_level("INFO", "drunet")
    log_cases(cases)
    assert f"ET is {4 if convention == 'brats' else 3}" in caplog.text


def test_a_case_out_of_step_with_its_cohort_is_an_error_naming_the_file(tmp_path, input_error):
    for number, convention in enumerate(("brats", "brats2023", "brats")):
        write_layout(tmp_path, "brats2021", f"BraTS2021_0000{number}", file_labels(convention))
    cases = find_cases(CaseSource(tmp_path))
    assert {case.convention for case in cases} == {"brats"}
    load_case(cases[0])
    with input_error("BraTS2021_00001_seg.nii.gz", "label 3"):
        load_case(cases[1])


@pytest.mark.parametrize(("layout", "value"), [("brats2021", 3), ("brats2023", 4)])
def test_3_and_4_in_one_mask_are_an_error_outside_2024(tmp_path, input_error, layout, value):
    seg = file_labels("brats")
    seg[0, 0, :2] = (3, 4)
    write_layout(tmp_path, layout, seg=seg)
    (case,) = find_cases(CaseSource(tmp_path))
    with input_error(case.mask[0], f"label {value}"):
        load_case(case)


def test_a_cavity_under_a_2023_name_needs_the_layout_said(tmp_path, input_error):
    tissues = TISSUES.copy()
    tissues[0] = 4
    write_layout(tmp_path, "brats2023", seg=file_labels("brats2024", tissues))
    with input_error("--layout brats2024"):
        load_case(find_cases(CaseSource(tmp_path))[0])
    (case,) = find_cases(CaseSource(tmp_path, layout="brats2024"))
    assert (regions_from_labels(load_case(case).labels, case.convention, REGIONS) == EXPECTED).all()


def test_a_cohort_of_cavities_alone_keeps_its_meaning(tmp_path):
    tissues = np.where(TISSUES == 3, 4, TISSUES)  # 4 and no 3: as in BraTS 2021, and yet no enhancing tumour
    write_layout(tmp_path, "brats2024", seg=file_labels("brats2024", tissues))
    (case,) = find_cases(CaseSource(tmp_path))
    whole, core, enhancing = regions_from_labels(load_case(case).labels, case.convention, REGIONS)
    assert (whole == np.isin(tissues, (1, 2))).all()
    assert (core == (tissues == 1)).all()
    assert not enhancing.any()


def test_a_damaged_mask_does_not_stop_the_search(tmp_path, input_error):
    for number in range(2):
        write_layout(tmp_path, "brats2021", f"BraTS2021_0000{number}", file_labels("brats2023"))
    first, second = find_cases(CaseSource(tmp_path))
    first.mask[0].write_bytes(first.mask[0].read_bytes()[:60])
    first, second = find_cases(CaseSource(tmp_path))
    assert second.convention == "brats2023"
    with input_error(first.mask[0]):
        load_case(first)


@pytest.mark.parametrize("layout", IDS)
def test_float_masks_may_miss_an_integer_by_a_thousandth(tmp_path, input_error, layout):
    seg = file_labels(LAYOUTS[layout].convention).astype(np.float32)
    write_layout(tmp_path, layout, seg=seg + np.float32(0.0009) * (-1) ** np.arange(seg.shape[2]))
    (case,) = find_cases(CaseSource(tmp_path))
    regions = regions_from_labels(load_case(case).labels, case.convention, REGIONS)
    assert (regions == EXPECTED).all()
    write(case.mask[0], seg + np.float32(0.002) * (seg == 1))
    with input_error(case.mask[0], "1.002"):
        load_case(case)


def test_slices_have_no_core(tmp_path, write_slices, input_error):
    pixels = dict(enumerate(VOLUMES["flair"].astype(np.uint8)))
    write_slices(tmp_path / "in", "c", pixels, {z: np.zeros((9, 8), np.uint8) for z in pixels})
    (case,) = find_cases(CaseSource(tmp_path / "in"))
    with input_error("--regions TC", "WT"):
        prepare_cases([case], ("flair",), ("WT", "TC"), tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------------
# Intensities and affines as they are on disk
# ------------------------------------------------------------------------------------------------------------


def test_intensities_that_wrapped_around_are_put_right(tmp_path):
    true = VOLUMES["flair"] * 140  # up to 34860, past int16
    assert 0 < (true > 32767).sum() < 0.1 * true.size
    wrapped = true.astype(np.uint16).view(np.int16)
    assert wrapped.min() < 0
    write(tmp_path / "x" / "x_flair.nii.gz", wrapped)
    loaded = load_case(find_cases(CaseSource(tmp_path))[0])
    assert (loaded.volume[0] == true).all()
    assert (normalise_volume(loaded.volume)[0] == normalise_volume(true[None].astype(np.float32))[0]).all()


@pytest.mark.parametrize(
    "array",
    [
        np.array([0, 5, -7, 32767, 300], np.int16),  # an undershoot, and a voxel that was cut off
        np.array([-32768] * 50 + [20000] * 50, np.int16),  # padded with the lowest value
        np.array([-30000.0, 30000.0] + [0.0] * 50, np.float32),
        np.array([-30000, 30000] + [0] * 50, np.int32),
        np.zeros(0, np.int16),
    ],
)
def test_other_negative_intensities_are_left_alone(array):
    assert unwrap_int16(array) is array


def test_a_few_voxels_cut_off_at_the_top_move_no_other_voxel():
    flair = np.pad(np.random.default_rng(0).integers(500, 900, (20, 30, 30)), 2).astype(np.float32)
    spiked = flair.copy()
    spiked[10, 15, 10:15] = (32767, 32767, 32767, -40, -40)
    plain, scores = normalise_volume(flair[None])[0][0], normalise_volume(spiked[None])[0][0]
    untouched = spiked == flair
    assert np.abs(scores - plain)[untouched].max() < 0.01
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("noise_mm", [1e-7, 1e-4])
def test_affines_that_differ_by_rounding_are_one_place(tmp_path, noise_mm):
    folder = write_layout(tmp_path, "brats2021")
    noise = np.random.default_rng(0).uniform(-noise_mm, noise_mm, (4, 4)) * [[1], [1], [1], [0]]
    for name in ("t1", "seg"):
        path = folder / f"BraTS2021_00002_{name}.nii.gz"
        array = file_labels("brats") if name == "seg" else VOLUMES[name].astype(np.int16)
        write(path, array, affine=AFFINE + noise)
    loaded = load_case(find_cases(CaseSource(tmp_path))[0], MODALITIES)
    assert (loaded.volume[1] == VOLUMES["t1"]).all()


# ------------------------------------------------------------------------------------------------------------
# All modalities and regions, from training to masks
# ------------------------------------------------------------------------------------------------------------


def run(script: str, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rename_as_2023(source: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Copy a BraTS 2021 cohort to BraTS 2023's names, each label array changed."""
    for path in sorted(source.glob("*/*.nii.gz")):
        number, name = path.name.removesuffix(".nii.gz").removeprefix("BraTS2021_").split("_")
        case_id = f"BraTS-GLI-{number}-000"
        new = target / case_id / f"{case_id}-{HYPHENS[name]}.nii.gz"
        new.parent.mkdir(parents=True, exist_ok=True)
        if name != "seg":
            shutil.copy(path, new)
            continue
        image = nib.load(path)
        nib.save(nib.Nifti1Image(change(np.asanyarray(image.dataobj)), image.affine, image.header), new)


def test_four_modalities_and_three_regions_from_training_to_masks(tmp_path, phantom_cohort):
    data = tmp_path / "gli"
    rename_as_2023(phantom_cohort, data, lambda labels: np.where(labels == 4, 3, labels).astype(np.uint8))
    tiny = ["--size", 48, "--widths", 4, 8, 16, "--batch-size", 8, "--slabs-per-epoch", 16, "--workers", 0]
    options = ["--modalities", *MODALITIES, "--regions", *REGIONS, "--epochs", 1, "--device", "cpu"]
    said = run("train_drunet_v2.py", "--data-dir", data, "--run", "all", *tiny, *options, cwd=tmp_path)
    assert "BraTS 2023: 8 cases, 8 with masks, 4 modalities\n" in said
    case = find_cases(CaseSource(data))[0]
    inputs = ["--input", data / case.case_id, "--threshold", 0, "--device", "cpu"]
    run("inference_v2.py", *inputs, cwd=tmp_path)
    written = nib.load(tmp_path / "predictions" / f"{case.case_id}-seg.nii.gz")
    labels = np.asanyarray(written.dataobj)
    assert labels.shape == nib.load(case.mask[0]).shape
    assert set(np.unique(labels)) == {3}  # at threshold 0 all is ET, which 2023 calls 3
    assert LABEL_CONVENTIONS[case.convention]["ET"] == (3,)


def test_a_runs_cases_are_found_as_the_run_found_them(tmp_path, write_nifti, write_slices):
    write_slices(tmp_path / "c", "c", {1: np.zeros((4, 4, 3), np.uint8)}, {1: np.zeros((4, 4), np.uint8)})
    write_nifti(tmp_path / "d" / "d_t1.nii", np.zeros((2, 2, 2), np.uint8))  # no FLAIR
    settings = {"modalities": ["flair"], "slice_channel": 2, "skip_bad": True}
    (case,) = find_cases_of_run(settings, tmp_path)
    assert (case.case_id, case.slice_channel) == ("c", 2)
    with pytest.raises(InputError, match="d has no flair"):
        find_cases_of_run(settings | {"skip_bad": False}, tmp_path)
