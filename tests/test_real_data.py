"""Real MRI, where DRUNET_DATA names a folder that holds it: counts, geometry, labels, one load of each."""

import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cohort.cases import MODALITIES, load_case, save_labels
from cohort.labels import regions_from_labels
from cohort.layouts import CaseSource, cases_of_files, find_cases
from cohort.phantom import is_phantom
from cohort.preprocess import brain_mask, normalise_volume
from runtime.errors import InputError

pytestmark = pytest.mark.skipif("DRUNET_DATA" not in os.environ, reason="DRUNET_DATA names no folder")
ROOT = Path(os.environ.get("DRUNET_DATA", "."))


def test_lgg_has_88_patients_with_one_masked_case_each():
    cases = find_cases(CaseSource(ROOT / "lgg"))
    assert len(cases) == 88
    assert len({case.patient_id for case in cases}) == 88
    for case in cases:
        depth = len(case.modalities["flair"])
        assert 20 <= depth <= 88
        assert len(case.mask) == depth
        assert (case.layout, case.convention) == ("slices", "binary")
        numbers = [int(path.stem.rsplit("_", 1)[1]) for path in case.modalities["flair"]]
        assert numbers == list(range(1, depth + 1))


def test_an_lgg_case_loads_with_its_tumour_in_neighbouring_slices():
    case = find_cases(CaseSource(ROOT / "lgg" / "TCGA_CS_4942_19970222"))[0]
    loaded = load_case(case)
    assert loaded.volume.shape == (1, 20, 256, 256)
    assert loaded.spacing_mm == (1.0, 1.0, 1.0)
    assert set(np.unique(loaded.labels)) == {0, 1}
    slices = np.flatnonzero(loaded.labels.any((1, 2)))
    assert (np.diff(slices) == 1).all()  # slices in a wrong order would tear it apart
    head = brain_mask(loaded.volume[0])
    assert 0.1 < head.mean() < 0.6  # with its skull, without the air
    assert (loaded.labels[head] == 1).sum() > 0.95 * (loaded.labels == 1).sum()
    assert not is_phantom(case)


def test_rgb_tif_and_grey_png_of_one_case_are_the_same_flair():
    (tif,) = find_cases(CaseSource(ROOT / "kaggle_3m"))
    png = find_cases(CaseSource(ROOT / "lgg" / "TCGA_CS_4942_19970222"))[0]
    assert tif.patient_id == "TCGA_CS_4942"
    assert len(tif.modalities["flair"]) == 20
    first, second = load_case(tif), load_case(png)
    assert (first.volume == second.volume).all()
    assert (first.labels == second.labels).all()
    with Image.open(tif.modalities["flair"][9]) as picture:
        colours = np.asarray(picture)
    for channel in (0, 1, 2):
        (case,) = find_cases(CaseSource(ROOT / "kaggle_3m", slice_channel=channel), ("flair",))
        assert (load_case(case).volume[0, 9] == colours[..., channel]).all()


def test_rgb_slices_hold_three_sequences_and_the_grey_flair():
    names = ("t1", "flair", "t1ce")
    cases = find_cases(CaseSource(ROOT / "lgg_rgb"), names)
    assert len(cases) == 20
    for case in cases:
        loaded = load_case(case, names)
        (grey,) = find_cases(CaseSource(ROOT / "lgg" / case.case_id))
        assert list(grey.modalities) == ["flair"]
        assert (loaded.volume[1] == load_case(grey).volume[0]).all()
        assert loaded.warnings == ()


def test_brats21_cases_load_in_their_true_layout():
    cases = find_cases(CaseSource(ROOT / "brats21"), MODALITIES)
    assert [case.case_id for case in cases] == ["BraTS2021_00000", "BraTS2021_00003", "BraTS2021_00495"]
    assert nib.load(cases[2].mask[0]).get_data_dtype() == np.uint16
    case = cases[2]
    loaded = load_case(case)
    assert loaded.volume.shape == (1, 155, 240, 240)
    assert loaded.spacing_mm == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(
        loaded.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], atol=1e-5
    )
    file = np.asanyarray(nib.load(case.mask[0]).dataobj)
    whole, core, enhancing = regions_from_labels(loaded.labels, "brats", ("WT", "TC", "ET"))
    assert whole.sum() == (file > 0).sum()
    assert core.sum() == np.isin(file, (1, 4)).sum()
    assert enhancing.sum() == (file == 4).sum()
    brain = brain_mask(loaded.volume[0])
    assert brain.sum() > 0.95 * (loaded.volume[0] > 0).sum()
    assert not brain[loaded.volume[0] == 0].any()
    assert not is_phantom(case)


def test_a_mask_of_a_brats21_case_is_written_as_its_reference_lies(tmp_path):
    case = find_cases(CaseSource(ROOT / "brats21"))[0]
    path = save_labels(load_case(case).labels, case, tmp_path)
    written, reference = nib.load(path), nib.load(case.mask[0])
    assert (np.asanyarray(written.dataobj) == np.asanyarray(reference.dataobj)).all()
    np.testing.assert_allclose(written.affine, reference.affine)


def test_a_flair_that_is_already_z_scored_is_normalised_all_the_same():
    folder = ROOT / "brats13" / "brats_2013_pat0001_1"
    (case,) = cases_of_files([folder / "Flair_subtrMeanDivStd.nii.gz"], ("flair",))
    volume = load_case(case).volume
    assert volume.min() < -3  # its background
    scores, found = normalise_volume(volume)
    brain = np.asanyarray(nib.load(folder / "brainmask.nii.gz").dataobj).transpose(2, 1, 0) > 0.5
    assert (found == brain_mask(volume[0])).all()
    assert not found[~brain].any()
    assert found.sum() > 0.9 * brain.sum()  # its darkest fluid is left out
    low, median, high = np.percentile(scores[0][found], [25, 50, 75])
    assert abs(median) < 0.01
    assert abs(high - low - 1.349) < 0.01  # as of a normal distribution of SD 1


def test_brats13_labels_are_not_taken_for_brats21_ones(tmp_path):
    # There 3 is non-enhancing core: a user who only renames the file must hear of it.
    folder = ROOT / "brats13" / "brats_2013_pat0001_1"
    for name, source in (("flair", "Flair_subtrMeanDivStd"), ("seg", "OTMultiClass")):
        shutil.copy(folder / f"{source}.nii.gz", tmp_path / f"x_{name}.nii.gz")
    (case,) = find_cases(CaseSource(tmp_path))
    with pytest.raises(InputError, match=r"x_seg\.nii\.gz: unknown label 3"):
        load_case(case)
