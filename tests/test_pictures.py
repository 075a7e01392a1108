"""Cases of pictures: multi-page TIF, folders of slices, their masks read and written."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cohort.cache import prepare_cases
from cohort.cases import load_case, save_labels
from cohort.check import check_case, check_cohort
from cohort.layouts import CaseSource, find_cases

FLAIR = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def grey(value: int, dtype: type = np.uint8) -> np.ndarray:
    return np.full((4, 6), value, dtype)


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
# Masks written
# ------------------------------------------------------------------------------------------------------------


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
