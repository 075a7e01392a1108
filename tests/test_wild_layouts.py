"""Names and layouts of public data sets, written by their own rules: the phantom and its regions come out."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from audit.inputs import choose_inputs
from cohort.cases import MODALITIES, load_case, save_labels
from cohort.check import check_cohort
from cohort.labels import convention_of_names, labels_from_regions, regions_from_labels, values_of
from cohort.layouts import CaseSource, cases_of_files, find_cases
from cohort.resolvers import modality_named
from cohort.selection import TrainingSource, prepare_parts, select_cases
from inference_v2 import InferenceConfig

REGIONS = ("WT", "TC", "ET")
SHAPE = (6, 9, 8)  # D, H, W
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
VOLUMES = {
    name: np.random.default_rng(seed).integers(50, 250, SHAPE).astype(np.int16)
    for seed, name in enumerate(MODALITIES)
}
TISSUES = np.zeros(SHAPE, np.uint8)  # 0 background, 1 core, 2 edema, 3 enhancing
TISSUES[1:5, 2:7, 2:7] = 2
TISSUES[2:4, 3:6, 3:6] = 3
TISSUES[2:4, 4, 4] = 1
EXPECTED = np.stack([np.isin(TISSUES, values) for values in ((1, 2, 3), (1, 3), (3,))])
OLD, NEW, MSD = (np.array(values, np.uint8)[TISSUES] for values in ((0, 1, 2, 4), (0, 1, 2, 3), (0, 2, 1, 3)))


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), AFFINE), path)
    return path


def write_files(root: Path, names: dict[str, str], seg: np.ndarray) -> None:
    """Write files {modality or "seg": path below root}."""
    for modality, name in names.items():
        write(root / name, seg if modality == "seg" else VOLUMES[modality])


def channels(folder: str, prefix: str, words: tuple[str, str, str, str], mask: str) -> dict[str, str]:
    """Return the files of one case: words of FLAIR, T1, T1ce, T2."""
    return {name: f"{folder}/{prefix}{word}" for name, word in zip(MODALITIES, words, strict=True)} | {
        "seg": mask
    }


UPENN, UCSF, SUB = "UPENN-GBM-00001_11", "UCSF-PDGM-0004_FU003d", "sub-07_ses-2"
BIDS_WORDS = ("FLAIR.nii.gz", "T1w.nii.gz", "ce-gadolinium_T1w.nii.gz", "T2w.nii.gz")
ANAT = "sub-07/ses-2/anat"
SSA, PLAIN = "BraTS2024_SSA-00002-000", ("flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz")
OLD_WORDS = {"Gd": "t1Gd", "GD": "T1GD", "c": "T1c"}
WILD = {
    "UPENN": (
        UPENN,
        channels(
            f"images_structural/{UPENN}",
            f"{UPENN}_",
            ("FLAIR.nii.gz", "T1.nii.gz", "T1GD.nii.gz", "T2.nii.gz"),
            f"images_segm/{UPENN}_segm.nii.gz",
        ),
        OLD,
    ),
    "UCSF": (
        UCSF,
        channels(
            UCSF,
            f"{UCSF}_",
            ("FLAIR.nii.gz", "T1.nii.gz", "T1c.nii.gz", "T2.nii.gz"),
            f"{UCSF}/{UCSF}_tumor_segmentation.nii.gz",
        ),
        OLD,
    ),
    "BIDS": (SUB, channels(ANAT, f"{SUB}_", BIDS_WORDS, f"{ANAT}/{SUB}_dseg.nii.gz"), NEW),
    "BIDS derivatives": (
        SUB,
        channels(
            ANAT, f"{SUB}_", BIDS_WORDS, f"derivatives/manual/{ANAT}/{SUB}_space-T1w_desc-tumor_mask.nii.gz"
        ),
        OLD,
    ),
    "SSA": (SSA, channels(SSA, f"{SSA}_", PLAIN, f"{SSA}/{SSA}_seg.nii.gz"), NEW),
    "upper case": (
        "P1",
        channels("P1", "P1_", ("FLAIR.NII.GZ", "T1.NII.GZ", "T1CE.NII.GZ", "T2.NII.GZ"), "P1/P1_SEG.NII.GZ"),
        OLD,
    ),
    "MET": (
        "BraTS-MET-00001-000",
        channels(
            "a",
            "BraTS-MET-00001-000-",
            ("t2f.nii.gz", "t1n.nii.gz", "t1c.nii.gz", "t2w.nii.gz"),
            "a/BraTS-MET-00001-000-seg.nii.gz",
        ),
        np.where((TISSUES == 0) & (np.arange(8) == 7), 4, NEW).astype(np.uint8),  # cavities are no tumour
    ),
    **{
        f"t1{word}": (
            "P1",
            channels("P1", "P1_", (*PLAIN[:2], f"{name}.nii.gz", PLAIN[3]), "P1/P1_seg.nii.gz"),
            OLD,
        )
        for word, name in OLD_WORDS.items()
    },
}


@pytest.mark.parametrize("name", WILD)
def test_the_phantom_is_the_same_in_layouts_of_the_wild_and_its_masks_are_read_back(tmp_path, name):
    case_id, files, seg = WILD[name]
    write_files(tmp_path, files, seg)
    (case,) = find_cases(CaseSource(tmp_path), MODALITIES)
    assert case.case_id == case_id
    loaded = load_case(case, MODALITIES)
    assert (loaded.volume == np.stack(list(VOLUMES.values()))).all()
    assert (regions_from_labels(loaded.labels, case.convention, REGIONS) == EXPECTED).all()
    written = save_labels(labels_from_regions(EXPECTED, REGIONS, case.convention), case, tmp_path / "out")
    case.mask[0].unlink()
    shutil.move(written, case.modalities["flair"][0].parent)
    shutil.rmtree(tmp_path / "out")
    (again,) = find_cases(CaseSource(tmp_path))
    assert (regions_from_labels(load_case(again).labels, again.convention, REGIONS) == EXPECTED).all()


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        ({"background": 0, "edema": 1, "non-enhancing": 2, "enhancing tumor": 3}, (0, 2, 1, 3)),
        ({"0": "background", "1": "necrotic core", "2": "edema", "3": "enhancing"}, (0, 1, 2, 3)),
        (
            {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
            (0, 2, 1, 3),
        ),
        ({"background": 0, "ET": 1, "NCR": 2, "ED": 3}, (0, 2, 3, 1)),
    ],
)
def test_nnunet_says_channels_and_labels_in_its_json(tmp_path, labels, values):
    order = {"0": "T1w", "1": "T1Gd", "2": "T2w", "3": "FLAIR"}
    facts = {"channel_names": order, "labels": labels, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    for number, name in enumerate(("t1", "t1ce", "t2", "flair")):
        write(tmp_path / "imagesTr" / f"HGG_01_{number:04d}.nii.gz", VOLUMES[name])
    write(tmp_path / "labelsTr" / "HGG_01.nii.gz", np.array(values, np.uint8)[TISSUES])
    (case,) = find_cases(CaseSource(tmp_path), MODALITIES)
    assert case.case_id == "HGG_01"
    loaded = load_case(case, MODALITIES)
    assert (loaded.volume == np.stack(list(VOLUMES.values()))).all()
    assert (regions_from_labels(loaded.labels, case.convention, REGIONS) == EXPECTED).all()
    written = save_labels(labels_from_regions(EXPECTED, REGIONS, case.convention), case, tmp_path / "out")
    assert written.name == "HGG_01.nii.gz"
    assert (nib.load(written).get_fdata() == nib.load(case.mask[0]).get_fdata()).all()
    flair = tmp_path / "imagesTr" / "HGG_01_0003.nii.gz"
    assert cases_of_files([flair], ("flair",))[0].case_id == "HGG_01"


def test_nnunet_labels_that_are_no_tissue_are_named(tmp_path, input_error):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "hippocampus": 1}})
    )
    write(tmp_path / "imagesTr" / "a_0000.nii.gz", VOLUMES["flair"])
    with input_error(tmp_path / "dataset.json", "hippocampus"):
        find_cases(CaseSource(tmp_path))


def test_spelt_out_conventions_by_hand():
    spelt = convention_of_names(
        {"background": 0, "ET": 1, "NCR": 2, "cyst": 4, "ED": 3}, Path("dataset.json")
    )
    assert values_of(spelt) == {"WT": (1, 2, 3, 4), "TC": (1, 2, 4), "ET": (1,)}
    assert convention_of_names({"background": 0, "tumor": 1}, Path("dataset.json")) == "binary"


def test_brain_and_tissue_masks_of_bids_are_not_the_tumours(tmp_path, input_error):
    write(tmp_path / "sub-1" / "anat" / "sub-1_FLAIR.nii.gz", VOLUMES["flair"])
    write(tmp_path / "sub-1" / "anat" / "sub-1_desc-brain_mask.nii.gz", NEW)
    write(tmp_path / "derivatives" / "fmriprep" / "sub-1" / "anat" / "sub-1_dseg.nii.gz", NEW)
    (case,) = find_cases(CaseSource(tmp_path))
    assert case.mask == ()
    for number in (1, 2):
        write(
            tmp_path / "derivatives" / "raters" / "sub-1" / "anat" / f"sub-1_desc-r{number}_mask.nii.gz", OLD
        )
    with input_error("sub-1_desc-r1_mask", "sub-1_desc-r2_mask"):
        find_cases(CaseSource(tmp_path))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_folders_named_like_files_are_entered(tmp_path, ending):
    case_id = "BraTS-GLI-00005-000"
    for name, word in zip(MODALITIES, ("t2f", "t1n", "t1c", "t2w"), strict=True):
        write(tmp_path / case_id / f"{case_id}-{word}{ending}" / "00000057_brain.nii", VOLUMES[name])
    write(tmp_path / case_id / f"{case_id}-seg{ending}" / "00000057_final_seg.nii", NEW)
    (case,) = find_cases(CaseSource(tmp_path), MODALITIES)
    loaded = load_case(case, MODALITIES)
    assert (case.case_id, case.layout) == (case_id, "brats2023")
    assert (loaded.volume == np.stack(list(VOLUMES.values()))).all()
    assert (regions_from_labels(loaded.labels, case.convention, REGIONS) == EXPECTED).all()


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/p_{z}.png", "masks/p_{z}.png"),
        ("train/Images/p_{z}.tif", "train/Masks/p_{z}_mask.tif"),
        ("images/p/{z}.png", "masks/p/{z}.png"),
        ("p/images/{z}.png", "p/masks/{z}.png"),
    ],
)
def test_pictures_and_masks_in_two_folders_are_one_case(tmp_path, image, mask):
    for z in (9, 10, 12):
        for pattern, value in ((image, z), (mask, 255 * (z == 10))):
            path = tmp_path / pattern.format(z=z)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)
    (case,) = find_cases(CaseSource(tmp_path))
    loaded = load_case(case)
    assert case.case_id == "p"
    assert loaded.volume[0, :, 0, 0].tolist() == [9, 10, 12]
    assert loaded.labels[:, 0, 0].tolist() == [0, 1, 0]


def test_where_nothing_is_found_the_message_shows_what_is_there(tmp_path, input_error):
    write(tmp_path / "a" / "scan.nii.gz", VOLUMES["flair"])
    with input_error(tmp_path, "a/scan.nii.gz", "_flair.nii.gz", "-t2f.nii.gz", "dataset.json", "sub-"):
        find_cases(CaseSource(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# Label conventions
# ------------------------------------------------------------------------------------------------------------


def test_paediatric_labels_are_read_and_written_by_their_own_convention(tmp_path):
    # 1 enhancing, 2 non-enhancing, 3 cyst, 4 edema
    seg = np.zeros(SHAPE, np.uint8)
    seg[0, 0, :7] = (1, 2, 2, 3, 4, 4, 4)
    case_id = "BraTS-PED-00001-000"
    write(tmp_path / f"{case_id}-t2f.nii.gz", VOLUMES["flair"])
    write(tmp_path / f"{case_id}-seg.nii.gz", seg)
    (case,) = find_cases(CaseSource(tmp_path))
    regions = regions_from_labels(load_case(case).labels, case.convention, REGIONS)
    assert regions.sum((1, 2, 3)).tolist() == [7, 4, 1]
    labels = labels_from_regions(regions, REGIONS, case.convention)
    assert labels[0, 0, :8].tolist() == [1, 2, 2, 2, 4, 4, 4, 0]
    path = save_labels(labels, case, tmp_path / "out")
    assert path.name == f"{case_id}-seg.nii.gz"


def write_cohort_of(root: Path, seg: np.ndarray, layout: str) -> None:
    joint, words = ("_", ("flair", "seg")) if layout == "brats2021" else ("-", ("t2f", "seg"))
    for number in range(4):
        case_id = f"BraTS2021_0000{number}" if layout == "brats2021" else f"BraTS-GLI-0000{number}-000"
        write(root / case_id / f"{case_id}{joint}{words[0]}.nii.gz", VOLUMES["flair"])
        write(root / case_id / f"{case_id}{joint}{words[1]}.nii.gz", seg)


@pytest.mark.parametrize("layout", ["brats2021", "brats2023"])
@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_one_label_are_the_whole_tumour_and_nothing_else(tmp_path, layout, value, input_error):
    write_cohort_of(tmp_path / "data", (EXPECTED[0] * value).astype(np.uint8), layout)
    case, *_ = find_cases(CaseSource(tmp_path / "data"))
    loaded = load_case(case)
    assert (regions_from_labels(loaded.labels, case.convention, ("WT",)) == EXPECTED[:1]).all()
    source = TrainingSource(str(tmp_path / "data"), regions=("WT", "TC", "ET"))
    with input_error("--regions WT TC ET", "show WT alone", "pass --regions WT"):
        select_cases(source, 0, tmp_path / "run", resumed=False)


def test_a_region_that_no_case_shows_is_an_error(tmp_path, input_error):
    write_cohort_of(tmp_path / "data", np.where(OLD == 4, 1, OLD).astype(np.uint8), "brats2021")
    cache = str(tmp_path / "cache")
    source = TrainingSource(str(tmp_path / "data"), regions=("WT", "TC", "ET"), cache_dir=cache)
    selection = select_cases(source, 0, tmp_path / "run", resumed=False)
    with input_error("--regions WT TC ET", "voxel of ET"):
        prepare_parts(selection, source)


# ------------------------------------------------------------------------------------------------------------
# Single files
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x_flair.nii.gz", "flair"),
        ("BraTS-GLI-00005-000-t2f.nii.gz", "flair"),
        ("T2_FLAIR.nii", "flair"),
        ("t2-flair_reg.nii.gz", "flair"),
        ("subject01_T1.nii.gz", "t1"),
        ("t1_to_flair.nii.gz", "t1"),
        ("sub-1_space-FLAIR_T1w.nii.gz", "t1"),
        ("sub-1_ce-gadolinium_T1w.nii.gz", "t1ce"),
        ("UPENN-GBM-00001_11_T1GD.nii.gz", "t1ce"),
        ("t1_post_contrast.nii.gz", "t1ce"),
        ("t1_pre_contrast.nii.gz", "t1"),
        ("x_t2w.NII.GZ", "t2"),
        ("x_seg.nii.gz", "seg"),
        ("UCSF-PDGM-0004_tumor_segmentation.nii.gz", "seg"),
        ("x_flair_brainmask.nii.gz", "seg"),
        ("GT_001_flair.nii.gz", "flair"),
        ("x_ADC.nii.gz", "other"),
        ("x_T2map.nii.gz", "other"),
        ("patient_17.nii.gz", None),
    ],
)
def test_what_a_name_says(name, kind):
    assert modality_named(name) == kind


@pytest.mark.parametrize("wanted", MODALITIES)
def test_files_of_other_modalities_and_masks_are_refused(tmp_path, wanted, input_error):
    words = {"flair": "flair", "t1": "T1w", "t1ce": "t1Gd", "t2": "T2"}
    names = {name: f"p_{word}.nii.gz" for name, word in words.items()} | {"seg": "p_seg.nii.gz"}
    for modality, name in names.items():
        path = write(tmp_path / name, NEW)
        if modality == wanted:
            assert len(cases_of_files([path], (wanted,))) == 1
            continue
        with input_error(path, "its name says", wanted):
            cases_of_files([path], (wanted,))
    everything = [tmp_path / name for name in names.values()]
    with input_error("its name says"):
        cases_of_files(everything, (wanted,))


def test_a_glob_of_a_cases_files_is_refused_by_inference(tmp_path, input_error):
    paths = [write(tmp_path / f"p_{word}.nii.gz", NEW) for word in ("flair", "t1", "t1ce", "t2", "seg")]
    model = SimpleNamespace(modalities=("flair",), is_partial=False)
    with input_error(paths[1], "it is t1", "the network takes flair"):
        choose_inputs(InferenceConfig(input=tuple(map(str, paths))), model, Path("best.pt"))
    (case,) = choose_inputs(InferenceConfig(input=(str(paths[0]),)), model, Path("best.pt"))
    assert case.modalities == {"flair": (paths[0],)}


def test_a_file_whose_name_says_nothing_is_taken_and_a_second_channel_is_not(tmp_path, input_error):
    path = write(tmp_path / "patient_17.nii.gz", VOLUMES["flair"])
    assert cases_of_files([path], ("t2",))[0].case_id == "patient_17"
    with input_error("p_0002.nii.gz", "channel 2"):
        cases_of_files([write(tmp_path / "p_0002.nii.gz", NEW)], ("flair",))


# ------------------------------------------------------------------------------------------------------------
# What lies beside the cases
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "BraTS2021_00000", "BraTS2021_00000/BraTS2021_00000", "shots"])
@pytest.mark.parametrize("name", ["preview", "figure", "BraTS2021_00000", "any"])
def test_pictures_beside_nifti_cases_neither_stop_nor_hide_them(tmp_path, write_slices, caplog, folder, name):
    write_cohort_of(tmp_path, OLD, "brats2021")
    expected = find_cases(CaseSource(tmp_path))
    write_slices(tmp_path / folder, name, {10: np.zeros((5, 5), np.uint8), 20: np.zeros((7, 5), np.uint8)})
    (tmp_path / folder / f"{name}_30.png").write_bytes(b"no picture")
    (tmp_path / folder / "thumbnail.png").write_bytes(b"no picture")
    assert find_cases(CaseSource(tmp_path)) == expected
    cases, problems = check_cohort(CaseSource(tmp_path), ("flair",))
    assert (cases, problems) == (expected, [])
    assert f"{name}_10.png" in caplog.text


def test_a_figure_beside_picture_cases_is_no_case(tmp_path, write_slices):
    pixels = np.zeros((4, 4), np.uint8)
    for case_id in ("p", "q"):
        write_slices(tmp_path, case_id, {1: pixels, 2: pixels})
    write_slices(tmp_path, "figure", {1: pixels})
    assert [case.case_id for case in find_cases(CaseSource(tmp_path))] == ["p", "q"]


def write_table(folder: Path, masks: list[Path]) -> None:
    rows = [f"{path.name[:15]},WT,1.0,2,from the file,{path}" for path in masks]
    (folder / "volumes.csv").write_text(
        "\n".join(["case,region,volume_ml,slices,spacing,mask", *rows]) + "\n"
    )


@pytest.mark.parametrize("name", ["predictions", "ours/run1"])
def test_what_inference_wrote_below_the_data_is_no_case(tmp_path, name, caplog):
    write_cohort_of(tmp_path, OLD, "brats2021")
    expected = find_cases(CaseSource(tmp_path))
    output = tmp_path / name
    masks = [save_labels(NEW, case, output) for case in expected]
    if name != "predictions":
        write_table(output, masks)
    assert find_cases(CaseSource(tmp_path)) == expected
    assert caplog.text.count("inference wrote") == 1
    assert str(output) in caplog.text


def test_masks_that_inference_wrote_among_the_cases_are_no_references(tmp_path):
    write_cohort_of(tmp_path, OLD, "brats2021")
    expected = find_cases(CaseSource(tmp_path))
    write_table(tmp_path, [save_labels(NEW, case, tmp_path) for case in expected])
    assert find_cases(CaseSource(tmp_path)) == expected
    folder = tmp_path / "BraTS2021_00001"
    (folder / "BraTS2021_00001_seg.nii.gz").unlink()
    write_table(folder, [save_labels(NEW, expected[1], folder, lambda path, write: write(path))])
    assert [bool(case.mask) for case in find_cases(CaseSource(tmp_path))] == [True, False, True, True]


@pytest.mark.parametrize("site", [".", "site"])
def test_an_output_folder_that_is_the_cohorts_own_hides_no_picture_case(tmp_path, site, write_slices):
    root = tmp_path / site
    for case_id in ("p", "q"):
        write_slices(root / case_id, case_id, {1: np.zeros((4, 4), np.uint8)})
    expected = find_cases(CaseSource(tmp_path))
    write_table(root, [save_labels(np.ones((1, 4, 4)), case, root) for case in expected])
    assert (root / "p" / "p_1_mask.png").exists()
    assert find_cases(CaseSource(tmp_path)) == expected


def test_an_output_folder_that_holds_the_cases_folders_hides_none(tmp_path):
    write_cohort_of(tmp_path / "site", OLD, "brats2021")
    expected = find_cases(CaseSource(tmp_path))
    masks = [save_labels(NEW, case, tmp_path / "site") for case in expected]
    write_table(tmp_path / "site", masks[:1])  # the others were written by an earlier run
    assert find_cases(CaseSource(tmp_path)) == expected


def test_masks_of_upenn_that_nobody_drew_are_no_cases(tmp_path):
    write_files(tmp_path, *WILD["UPENN"][1:])
    write(tmp_path / "automated_segm" / f"{UPENN}_automated_approx_segm.nii.gz", NEW)
    (case,) = find_cases(CaseSource(tmp_path))
    assert case.mask == (tmp_path / "images_segm" / f"{UPENN}_segm.nii.gz",)


def test_names_that_only_begin_like_bids_are_found_as_before(tmp_path):
    write(tmp_path / "sub-01_visit1_flair.nii.gz", VOLUMES["flair"])
    assert [case.case_id for case in find_cases(CaseSource(tmp_path))] == ["sub-01_visit1"]


def test_a_volumes_csv_of_somebody_else_hides_nothing(tmp_path):
    write_cohort_of(tmp_path, OLD, "brats2021")
    (tmp_path / "BraTS2021_00000" / "volumes.csv").write_text("structure,ml\nhippocampus,3\n")
    assert len(find_cases(CaseSource(tmp_path))) == 4
