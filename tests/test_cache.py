"""The cache: the same pixels with and without it, keys by content, many writers, damage, a full disk."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import final_evaluation_v2
from audit.statistics import summarise_calibration
from cohort import cache as cache_module
from cohort.cache import (
    PreparedCase,
    box_around,
    clear_cache,
    find_box,
    open_entry,
    prepare_cases,
    prepare_for_all_ranks,
    write_entry,
)
from cohort.cases import Case, load_case
from cohort.fingerprints import fingerprint, hash_image
from cohort.labels import regions_from_labels
from cohort.layouts import CaseSource, find_cases
from cohort.preprocess import BRAIN_SLICE_VOXELS, brain_mask, gather_slab, normalise_volume
from dataset_balance_v2 import BalanceConfig, main

REPOSITORY = Path(__file__).resolve().parent.parent


def make_head(seed: int = 0) -> np.ndarray:
    """Return (8, 40, 40) float32: integers of 300..1000 inside an ellipsoid, 0 around it."""
    z, y, x = np.ogrid[-3.5:4.5, -19.5:20.5, -19.5:20.5]
    brain = (z / 3.2) ** 2 + (y / 16) ** 2 + (x / 13) ** 2 < 1
    return np.where(brain, np.random.default_rng(seed).integers(300, 1000, brain.shape), 0).astype(np.float32)


@pytest.fixture
def case(tmp_path, write_nifti) -> Case:
    """One case of a (8, 40, 40) head with 16 voxels of edema in slice 3 and 4 of ET in slice 4."""
    labels = np.zeros((8, 40, 40), np.uint8)
    labels[3, 18:22, 18:22] = 2
    labels[4, 18:20, 18:20] = 4
    for name, array in (("flair", make_head()), ("t1", make_head(1)), ("seg", labels)):
        write_nifti(tmp_path / "in" / f"x_{name}.nii.gz", array.astype(np.int16).transpose(2, 1, 0))
    return find_cases(CaseSource(tmp_path / "in"))[0]


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def prepare(
    case: Case, cache: Path, modalities: Sequence[str] = ("flair",), regions: Sequence[str] = ("WT", "ET")
) -> PreparedCase:
    """Return one case prepared."""
    return prepare_cases([case], modalities, regions, cache)[0]


def entries(cache: Path) -> set[str]:
    """Return the names of everything in the cache's entries, hidden ones too."""
    return {path.name for path in (cache / "entries").iterdir()}


def stored(volume: np.ndarray, masks: np.ndarray, folder: Path) -> PreparedCase:
    """Return the prepared case of an entry written from arrays; the first mask is the brain."""
    facts = write_entry(folder, volume, masks, (1, 1, 1), {})
    return open_entry(Case("x", "x", "x", "brats2021", "brats", {}, ()), folder, facts)


# ------------------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------------------


def test_a_prepared_case_holds_what_reading_and_normalising_give(case, cache):
    prepared = prepare(case, cache, ("flair", "t1"))
    loaded = load_case(case, ("flair", "t1"))
    scores, brain = normalise_volume(loaded.volume)
    assert prepared.volume.dtype == np.float16
    assert (prepared.volume.astype(np.float32).view(np.int32) == scores.view(np.int32)).all()  # bit for bit
    assert prepared.reference.dtype == np.bool_
    assert (prepared.reference == regions_from_labels(loaded.labels, "brats", ("WT", "ET"))).all()
    assert prepared.brain.dtype == np.bool_
    assert (prepared.brain == brain).all()
    assert prepared.brain_voxels == tuple(brain.sum((1, 2)).tolist())
    assert prepared.region_voxels == ((0, 0, 0, 16, 4, 0, 0, 0), (0, 0, 0, 0, 4, 0, 0, 0))
    assert prepared.reference_box == ((3, 5), (18, 22), (18, 22))
    assert prepared.spacing_mm == (1.0, 1.0, 1.0)
    assert (prepared.case_id, prepared.patient_id, prepared.cohort) == ("x", "x", "in")


@pytest.mark.parametrize("context", [0, 1, 3])
def test_every_slab_is_that_of_the_uncached_volume(case, cache, context):
    prepared = prepare(case, cache, ("flair", "t1"))
    loaded = load_case(case, ("flair", "t1"))
    scores, _ = normalise_volume(loaded.volume)
    reference = regions_from_labels(loaded.labels, "brats", ("WT", "ET"))
    assert prepared.box[0] == (1, 7)  # the head: slabs reach beyond what is stored
    for z in range(8):
        slab = prepared.slab(z, context)
        assert slab.dtype == np.float32
        assert (slab.view(np.int32) == gather_slab(scores, z, context).view(np.int32)).all()
        found = prepared.reference_slice(z)
        assert found.dtype == np.bool_
        assert (found == reference[:, z]).all()


@pytest.mark.parametrize("z", [-1, 8])
def test_a_slab_outside_the_volume_is_an_error(case, cache, z):
    with pytest.raises(ValueError, match=str(z)):
        prepare(case, cache).slab(z, 1)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 11))
VALUES = st.sampled_from([0.0, -0.0, -4.0, 8.0, 0.333251953125])


@given(data=st.data(), shape=SHAPES, background=VALUES)
def test_cropping_loses_nothing(tmp_path_factory, data, shape, background):
    volume = np.full(shape, background, np.float16)
    masks = np.zeros((3, *shape[1:]), bool)
    for _ in range(data.draw(st.integers(0, 4))):  # a few voxels of their own, so that boxes are smaller
        index = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        volume[index] = data.draw(VALUES)
        mask_index = [data.draw(st.integers(0, size - 1)) for size in shape[1:]]
        masks[(data.draw(st.integers(0, 2)), *mask_index)] = True
    prepared = stored(volume, masks, tmp_path_factory.mktemp("cache") / "entries" / "x")
    assert (prepared.volume.view(np.uint16) == volume.view(np.uint16)).all()
    assert (prepared.brain == masks[0]).all()
    assert (prepared.reference == masks[1:]).all()
    assert prepared.brain_voxels == tuple(masks[0].sum((1, 2)).tolist())
    z = data.draw(st.integers(0, shape[1] - 1))
    slab = gather_slab(volume, z, 1).astype(np.float32)
    assert (prepared.slab(z, 1).view(np.int32) == slab.view(np.int32)).all()
    assert (prepared.reference_slice(z) == masks[1:, z]).all()


def test_boxes_by_hand():
    mask = np.zeros((4, 5, 6), bool)
    assert box_around(mask) == ((0, 1), (0, 1), (0, 1))
    mask[1, 2, 3] = mask[2, 2, 5] = True
    assert box_around(mask) == ((1, 3), (2, 3), (3, 6))
    volume = np.full((2, 4, 5, 6), -1.5, np.float16)
    volume[1] = 0.25
    masks = np.zeros((3, 4, 5, 6), bool)
    assert find_box(volume, masks) == ((0, 1), (0, 1), (0, 1))
    volume[0, 3, 1, 1] = 2
    volume[1, 1, 4, 0] = 2
    assert find_box(volume, masks) == ((1, 4), (1, 5), (0, 2))
    masks[2, 2, 0, 4] = True
    assert find_box(volume, masks) == ((1, 4), (0, 5), (0, 5))


def test_an_entry_holds_the_box_alone(case, cache):
    prepared = prepare(case, cache)
    inside = np.argwhere(make_head() > 0)
    assert prepared.box == tuple(zip(inside.min(0), inside.max(0) + 1, strict=True))
    depth, height, width = inside.max(0) - inside.min(0) + 1
    assert (prepared.folder / "volume.npy").stat().st_size == 128 + 2 * depth * height * width
    # brain, WT and ET, a bit a voxel in whole bytes a row
    assert (prepared.folder / "masks.npy").stat().st_size == 128 + 3 * depth * height * math.ceil(width / 8)


def test_changing_a_slab_does_not_change_the_cache(case, cache):
    prepared = prepare(case, cache)
    before = (prepared.folder / "volume.npy").read_bytes()
    prepared.slab(3, 1)[:] = 7
    prepared.volume[:] = 7
    prepared.reference_slice(3)[:] = True
    assert (prepared.folder / "volume.npy").read_bytes() == before
    assert prepared.slab(3, 1).max() != 7


def test_the_brain_is_that_of_the_raw_intensities_of_the_first_modality(phantom_cohort, cache):
    cases = find_cases(CaseSource(phantom_cohort))[:2]
    of_scores = []
    for case, prepared in zip(cases, prepare_cases(cases, ("flair", "t1"), ("WT",), cache), strict=True):
        brain = brain_mask(load_case(case, ("flair",)).volume[0])
        assert (prepared.brain == brain).all()
        assert prepared.brain_voxels == tuple(brain.sum((1, 2)).tolist())
        of_scores.append((brain_mask(prepared.volume[0].astype(np.float32)) == brain).all())
    assert not any(of_scores)  # clipped z-scores have another brain


def test_inverted_grey_values_in_which_no_brain_is_found_are_refused_each_time(
    phantom_cohort, tmp_path, write_nifti, input_error
):
    flair = load_case(find_cases(CaseSource(phantom_cohort))[0]).volume[0].transpose(2, 1, 0)
    for case_id, array in (("inverted", flair.max() - flair), ("sound", flair)):
        write_nifti(tmp_path / "data" / case_id / f"{case_id}_flair.nii.gz", array)
    for _ in range(2):
        with input_error("inverted_flair.nii.gz", "its flair is brightest in air"):
            prepare_cases(find_cases(CaseSource(tmp_path / "data")), ("flair",), (), tmp_path / "cache")


def test_the_audit_calibrates_over_the_brain_of_the_validation_cases(phantom_cohort, cache, monkeypatch):
    prepared = prepare_cases(find_cases(CaseSource(phantom_cohort))[:3], ("flair",), ("WT",), cache)
    model = SimpleNamespace(regions=("WT",), thresholds=(0.5,), checkpoint={}, is_ensemble=False)

    def predict_half(_model: object, volume: np.ndarray, *_: object) -> np.ndarray:
        return np.full((3, 1, *volume.shape[1:]), 0.5, np.float32)

    monkeypatch.setattr(final_evaluation_v2, "predict_views", predict_half)
    audits = [final_evaluation_v2.evaluate_case(model, "validation", case, 16) for case in prepared]
    for mode in ("plain", "tta"):
        table = summarise_calibration(sum(audit.bins[mode][0] for audit in audits))
        assert table["n_voxels"] == sum(sum(case.brain_voxels) for case in prepared)
    assert not final_evaluation_v2.evaluate_case(model, "internal", prepared[0], 16).bins["tta"].any()


# ------------------------------------------------------------------------------------------------------------
# Keys: content and settings
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """List to which every case that is decoded adds its id."""
    ids: list[str] = []

    def load_and_note(case: Case, *arguments: object) -> object:
        ids.append(case.case_id)
        return load_case(case, *arguments)

    monkeypatch.setattr(cache_module, "load_case", load_and_note)
    return ids


def test_the_second_time_nothing_is_read(case, cache, decoded, monkeypatch):
    first = prepare(case, cache)
    assert decoded == ["x"]
    monkeypatch.setattr(cache_module, "file_sha256", None)  # would raise
    assert prepare(case, cache) == first
    assert decoded == ["x"]


def test_a_touched_moved_or_renamed_case_is_found_again(case, cache, decoded, tmp_path):
    first = prepare(case, cache)
    for path in (*case.modalities["flair"], *case.mask):
        os.utime(path, ns=(0, 0))
    assert prepare(case, cache) == first
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("flair", "seg"):
        shutil.copy(tmp_path / "in" / f"x_{name}.nii.gz", moved / f"y_{name}.nii.gz")
    renamed = prepare(find_cases(CaseSource(moved))[0], cache)
    assert dataclasses.replace(renamed, case_id="x", patient_id="x", cohort="in") == first
    assert (renamed.case_id, renamed.patient_id, renamed.cohort) == ("y", "y", "elsewhere")
    assert decoded == ["x"]


def test_a_file_rewritten_within_its_size_is_read_anew(cache, tmp_path, write_nifti):
    path = write_nifti(tmp_path / "in" / "x_flair.nii", make_head().transpose(2, 1, 0))
    write_nifti(tmp_path / "in" / "x_seg.nii", np.zeros((40, 40, 8), np.uint8))
    case = find_cases(CaseSource(tmp_path / "in"))[0]
    before, size = prepare(case, cache), path.stat().st_size
    write_nifti(path, make_head(5).transpose(2, 1, 0))
    os.utime(path, ns=(0, 12345))  # whatever the clock's resolution
    after = prepare(case, cache)
    assert path.stat().st_size == size
    assert after.folder != before.folder
    assert (after.volume.astype(np.float32) == normalise_volume(load_case(case).volume)[0]).all()


def test_a_changed_mask_is_read_anew(case, cache, write_nifti):
    prepare(case, cache)
    write_nifti(case.mask[0], np.full((40, 40, 8), 4, np.uint8))
    assert sum(prepare(case, cache).region_voxels[1]) == 40 * 40 * 8


def test_other_modalities_regions_and_channels_have_entries_of_their_own(case, cache, tmp_path, write_slices):
    combinations = [
        (("flair",), ("WT",)),
        (("t1",), ("WT",)),
        (("flair", "t1"), ("WT",)),
        (("t1", "flair"), ("WT",)),
        (("flair",), ("ET",)),
        (("flair",), ("WT", "ET")),
    ]
    folders = {prepare(case, cache, *combination).folder for combination in combinations}
    assert len(folders) == len(combinations)
    rgb = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    write_slices(tmp_path / "png", "c", {1: rgb}, {1: np.zeros((12, 12), np.uint8)})
    volumes = [
        prepare(
            find_cases(CaseSource(tmp_path / "png", slice_channel=channel), ("flair",))[0],
            cache,
            regions=("WT",),
        ).volume
        for channel in (0, 1)
    ]
    assert (volumes[0] != volumes[1]).any()


def test_another_reading_of_the_same_bytes_has_an_entry_of_its_own(case, cache, write_nifti):
    write_nifti(case.mask[0], np.ones((40, 40, 8), np.uint8))
    binary = dataclasses.replace(case, convention="binary")
    folders = {prepare(found, cache, regions=("WT",)).folder for found in (case, binary)}
    assert len(folders) == 2


def test_cases_of_one_id_in_two_cohorts_do_not_share_an_entry(cache, tmp_path, write_nifti):
    # The second is unpacked from an archive: same names, sizes and times, other voxels.
    prepared = []
    for folder, seed in ((tmp_path / "a", 0), (tmp_path / "b", 1)):
        for name, array in (("flair", make_head(seed)), ("seg", np.zeros((8, 40, 40), np.uint8))):
            path = write_nifti(folder / f"x_{name}.nii", array.transpose(2, 1, 0))
            os.utime(path, ns=(10**18, 10**18))
        prepared.append(prepare(find_cases(CaseSource(folder))[0], cache))
    assert (prepared[0].volume != prepared[1].volume).any()


def test_a_resaved_image_is_known_by_its_content(case, cache, tmp_path, write_nifti):
    for name, seed in (("copy", 0), ("other", 7)):
        array = make_head(seed).astype(np.int16).transpose(2, 1, 0)
        write_nifti(tmp_path / name / f"{name}_flair.nii", array)  # not compressed: other bytes
        write_nifti(tmp_path / name / f"{name}_seg.nii", np.zeros((40, 40, 8), np.uint8))
    original, copy, other = (
        prepare(found, cache)
        for found in (case, *(find_cases(CaseSource(tmp_path / n))[0] for n in ("copy", "other")))
    )
    assert original.folder != copy.folder
    assert original.fingerprint == copy.fingerprint
    assert original.fingerprint != other.fingerprint


# ------------------------------------------------------------------------------------------------------------
# Damage, failures, several writers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["volume.npy", "masks.npy", "facts.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_entry_is_made_anew(case, cache, decoded, name, how):
    prepared = prepare(case, cache)
    path = prepared.folder / name
    whole = path.read_bytes()
    path.unlink() if how == "missing" else path.write_bytes(whole[:-3])
    assert prepare_cases([case], ("flair",), ("WT", "ET"), cache) == [prepared]
    assert path.read_bytes() == whole
    assert decoded == ["x", "x"]
    assert entries(cache) == {prepared.folder.name}


@pytest.mark.parametrize("failing", ["volume.npy", "masks.npy"])
def test_a_write_that_fails_leaves_no_entry(case, cache, monkeypatch, failing, input_error):
    save = np.save

    def fail(path: Path, *arguments: object) -> None:
        if Path(path).name == failing:
            raise OSError(28, "No space left on device")
        save(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with input_error(f"--cache-dir {cache}", "No space left", "free space"):
            prepare(case, cache)
    assert entries(cache) == set()
    assert prepare(case, cache).volume.shape == (1, 8, 40, 40)


def test_of_two_writers_of_one_entry_the_first_stays(case, cache, monkeypatch):
    others = []

    def read_while_another_prepares(*arguments: object) -> object:
        if not others:
            others.append(None)
            others[0] = prepare(case, cache)
            others.append((others[0].folder / "volume.npy").stat().st_ino)
        return load_case(*arguments)

    monkeypatch.setattr(cache_module, "load_case", read_while_another_prepares)
    prepared = prepare(case, cache)
    assert prepared == others[0]
    assert (prepared.folder / "volume.npy").stat().st_ino == others[1]
    assert entries(cache) == {prepared.folder.name}


SCRIPT = '''
"""Prepare a cohort as the arguments say; print entries and pixels as JSON, or the InputError."""

import hashlib
import json
import os
import signal
import sys

import numpy as np

from cohort.cache import prepare_cases
from cohort.layouts import CaseSource, find_cases
from runtime import processes
from runtime.errors import InputError

if __name__ == "__main__":
    cohort, cache, cores, how = sys.argv[1:]
    processes.count_cores = lambda: int(cores)
    processes.ITEMS_A_PROCESS = 1
    if how == "killed":
        save, saved = np.save, []

        def save_and_die(path, array):
            save(path, array)
            saved.append(path)
            if len(saved) == 4:
                with open(path, "r+b") as file:
                    file.truncate(200)
                os.kill(os.getpid(), signal.SIGKILL)

        np.save = save_and_die
    try:
        cases = prepare_cases(find_cases(CaseSource(cohort)), ("flair",), ("WT",), cache)
    except InputError as error:
        sys.exit(f"InputError: {error}")
    digest = hashlib.sha256()
    for case in cases:
        digest.update(case.volume.tobytes() + case.reference.tobytes())
    print(json.dumps({"entries": sorted(case.folder.name for case in cases), "pixels": digest.hexdigest()}))
'''


@pytest.fixture
def start(tmp_path, cache):
    """Function (cohort, cores, how) that starts the script on the test's cache."""
    script = tmp_path / "prepare.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = []

    def start_script(cohort: Path, cores: int = 1, how: str = "whole") -> subprocess.Popen[str]:
        command = [sys.executable, script, cohort, cache, str(cores), how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(list(map(str, command)), env=environment, text=True, **pipes))
        return started[-1]

    yield start_script
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def test_two_runs_that_build_at_once_get_what_one_alone_gets(start, phantom_cohort, tmp_path, cache):
    alone = prepare_cases(find_cases(CaseSource(phantom_cohort)), ("flair",), ("WT",), tmp_path / "alone")
    results = [finish(process) for process in [start(phantom_cohort), start(phantom_cohort, cores=2)]]
    assert results[0] == results[1]
    assert results[0]["entries"] == sorted(case.folder.name for case in alone)
    assert entries(cache) == set(results[0]["entries"])
    again = prepare_cases(find_cases(CaseSource(phantom_cohort)), ("flair",), ("WT",), cache)
    for one, other in zip(alone, again, strict=True):
        assert (one.volume == other.volume).all()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_what_a_killed_run_left_is_removed_and_what_it_finished_is_kept(
    start, phantom_cohort, cache, decoded
):
    process = start(phantom_cohort, how="killed")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (left,) = (cache / "entries").glob(".*")  # the half-written second case
    cases = find_cases(CaseSource(phantom_cohort))[:3]
    prepared = prepare_cases(cases, ("flair",), ("WT",), cache)
    assert decoded == ["BraTS2021_90001", "BraTS2021_90002"]
    folders = {case.folder.name for case in prepared}
    assert entries(cache) == folders | {left.name}  # as far as anyone can see another run may still write it
    for hours, names in ((23, folders | {left.name}), (25, folders)):
        os.utime(left, (time.time() - hours * 3600,) * 2)
        assert prepare_cases(cases, ("flair",), ("WT",), cache) == prepared
        assert entries(cache) == names
    assert (prepared[1].volume == normalise_volume(load_case(cases[1]).volume)[0]).all()


def test_an_unreadable_case_is_an_input_error_in_a_process_of_its_own_too(start, phantom_cohort, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(phantom_cohort, broken)
    path = next(broken.glob("*90003/*_flair.nii.gz"))
    path.write_bytes(path.read_bytes()[:-100])
    process = start(broken, cores=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(rf"^InputError: {re.escape(str(path))}: truncated or damaged", errors, re.M)
    assert "Traceback" not in errors


def test_the_first_rank_of_a_machine_prepares_and_the_others_read(
    phantom_cohort, cache, decoded, monkeypatch
):
    cases = find_cases(CaseSource(phantom_cohort))[:2]
    waited = []
    monkeypatch.setattr(cache_module, "wait_for_all", lambda: waited.append(list(decoded)))
    first = prepare_for_all_ranks(cases, ("flair",), ("WT",), cache)
    assert waited == [["BraTS2021_90000", "BraTS2021_90001"]]
    clear_cache(cache)
    monkeypatch.setattr(
        cache_module, "wait_for_all", lambda: prepare_cases(cases, ("flair",), ("WT",), cache)
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    decoded.clear()
    assert prepare_for_all_ranks(cases, ("flair",), ("WT",), cache) == first
    assert len(decoded) == 2  # by the rank waited for


# ------------------------------------------------------------------------------------------------------------
# Cases as leakage needs them
# ------------------------------------------------------------------------------------------------------------


def test_a_case_without_a_mask_is_prepared_for_its_fingerprint(case, cache):
    aliases = ("TCGA_CS_4942",)
    masked = prepare(dataclasses.replace(case, aliases=aliases), cache, regions=())
    unmasked = prepare(dataclasses.replace(case, mask=()), cache, regions=())
    whole = prepare(case, cache)
    assert (masked.aliases, unmasked.aliases) == (aliases, ())
    for prepared in (masked, unmasked):
        assert prepared.region_voxels == ()
        assert prepared.reference.shape == (0, 8, 40, 40)
        assert prepared.reference_slice(3).shape == (0, 40, 40)
        assert (prepared.volume == whole.volume).all()
        assert (prepared.brain == whole.brain).all()
    labels = load_case(case).labels
    assert masked.fingerprint == whole.fingerprint == fingerprint(make_head(), labels)
    assert unmasked.fingerprint == fingerprint(make_head(), None)
    assert len({masked.folder, unmasked.folder, whole.folder}) == 3


def test_the_fingerprint_is_of_flair_whatever_the_order(case, cache):
    assert prepare(case, cache, ("t1", "flair")).fingerprint == prepare(case, cache).fingerprint
    assert prepare(case, cache, ("t1",)).fingerprint["image_sha256"] == hash_image(make_head(1))


# ------------------------------------------------------------------------------------------------------------
# Room, and the end
# ------------------------------------------------------------------------------------------------------------


def test_the_log_says_what_was_made(phantom_cohort, cache, caplog):
    cases = find_cases(CaseSource(phantom_cohort))[:3]
    caplog.set_level("INFO", "drunet")
    size = sum(
        path.stat().st_size
        for case in prepare_cases(cases[:1], ("flair",), ("WT",), cache)
        for path in case.folder.glob("*.npy")
    )
    prepare_cases(cases, ("flair",), ("WT",), cache)
    prepare_cases(cases[:1], ("flair",), ("WT",), cache)
    assert [line.rpartition(", ")[2] for line in caplog.messages] == [
        "1 made now",
        "2 made now",
        "0 made now",
    ]
    assert caplog.messages[2] == f"cache: 1 cases, {size / 1e9:.3g} GB in {cache}, 0 made now"


def test_a_full_disk_is_told_after_the_first_case(
    phantom_cohort, cache, input_error, monkeypatch, decoded, tmp_path
):
    cases = find_cases(CaseSource(phantom_cohort))
    (one,) = prepare_cases(cases[:1], ("flair",), ("WT",), tmp_path / "other")
    size = sum(path.stat().st_size for path in one.folder.glob("*.npy"))
    decoded.clear()
    usage = shutil.disk_usage(phantom_cohort)._replace(free=7 * size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = (f"7 more cases need about {7 * size / 1e9:.3g} GB", f"{usage.free / 1e9:.3g} GB free")
    with input_error(f"--cache-dir {cache}", *words, "--clear-cache"):
        prepare_cases(cases, ("flair",), ("WT",), cache)
    assert decoded == ["BraTS2021_90000"]
    assert len(entries(cache)) == 1
    assert len(prepare_cases(cases[:7], ("flair",), ("WT",), cache)) == 7  # the other six fit


def test_the_command_removes_the_cache_and_nothing_else(case, cache, caplog, input_error, tmp_path):
    caplog.set_level("INFO", "drunet")
    prepare_cases([case], ("flair",), ("WT",), cache)
    (cache / "notes.txt").write_text("mine")
    main(BalanceConfig(cache_dir=str(cache), clear_cache=True))
    assert "removed" in caplog.messages[-1]
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]
    with input_error("--cache-dir", tmp_path / "in"):
        clear_cache(tmp_path / "in")
    assert len(list((tmp_path / "in").iterdir())) == 3
    assert clear_cache(tmp_path / "nowhere") == 0
    (cache / "notes.txt").unlink()
    prepare_cases([case], ("flair",), ("WT",), cache)
    (cache / "fingerprints").mkdir()  # as older versions had it
    (cache / "fingerprints" / "x.json").write_text("{}")
    (cache / "phantoms" / "v1_2_mm").mkdir(parents=True)  # as --phantom-share leaves them
    (cache / "phantoms" / "v1_2_mm" / "x.nii.gz").write_bytes(b"phantom")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert clear_cache(cache) == size - len(cache_module.CACHE_TAG)
    assert not cache.exists()


def test_prepared_phantoms_have_brain_tumour_and_slices_without_brain(phantom_cohort, cache):
    prepared = prepare_cases(find_cases(CaseSource(phantom_cohort))[:2], ("flair",), ("WT",), cache)
    assert [case.case_id for case in prepared] == ["BraTS2021_90000", "BraTS2021_90001"]
    for case in prepared:
        assert case.spacing_mm == (10.0, 5.0, 5.0)
        assert max(case.brain_voxels) > 400
        assert min(case.brain_voxels) < BRAIN_SLICE_VOXELS
        assert 0 < sum(case.region_voxels[0]) < sum(case.brain_voxels) / 3


# ------------------------------------------------------------------------------------------------------------
# Entries of the right size that hold something else
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(case, tmp_path):
    """(folder of the entry of a case, function that prepares it as a new run does)."""

    def prepare() -> PreparedCase:
        cache_module._verified.clear()
        return prepare_cases([case], ("flair",), ("WT",), tmp_path / "cache")[0]

    return prepare().folder, prepare


def fill_with_nan(path: Path) -> None:
    array = np.load(path)
    np.save(path, np.full_like(array, np.nan if array.dtype == np.float16 else 255))


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def move_spacing(path: Path) -> None:
    path.write_text(path.read_text().replace('"spacing_known": true', '"spacing_known": false'))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("volume.npy", fill_with_nan),
        ("masks.npy", fill_with_nan),
        ("volume.npy", flip_last_bit),
        ("masks.npy", flip_last_bit),
        ("facts.json", move_spacing),
    ],
)
def test_an_entry_of_the_right_size_is_not_believed_and_made_again(entry, caplog, name, harm):
    folder, prepare = entry
    path = folder / name
    sound, state = path.read_bytes(), path.stat()
    harm(path)
    assert path.read_bytes() != sound
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    prepare()
    assert path.read_bytes() == sound
    assert [record.levelname for record in caplog.records if "damaged" in record.message] == ["WARNING"]
    caplog.clear()
    prepare()
    assert "damaged" not in caplog.text


def test_any_flipped_bit_of_an_entry_is_found(entry):
    folder, _ = entry
    generator = np.random.default_rng(0)
    for name in ("volume.npy", "masks.npy", "facts.json"):
        sound = (folder / name).read_bytes()
        for bit in generator.integers(0, 8 * len(sound), 60).tolist():
            content = bytearray(sound)
            content[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(content)
            cache_module._verified.clear()
            facts = cache_module.read_facts(folder)
            # a space of the indentation may become another white space, which changes nothing
            assert facts is None or (name == "facts.json" and facts == json.loads(sound))
        (folder / name).write_bytes(sound)
    assert cache_module.read_facts(folder) == json.loads((folder / "facts.json").read_bytes())


def test_an_entry_is_read_through_once_a_run(entry, monkeypatch):
    _, prepare = entry
    prepared, real, read = prepare(), cache_module.file_crc32, []
    monkeypatch.setattr(cache_module, "file_crc32", lambda path: read.append(path.name) or real(path))
    assert cache_module.read_facts(prepared.folder)
    assert read == []
    prepare()
    assert sorted(read) == ["masks.npy", "volume.npy"]
