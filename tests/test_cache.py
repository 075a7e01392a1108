"""The cache: the same pixels with and without it, keys by content, many writers, damage, its limit."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cache_entry_v2
import cache_v2
from cache_entry_v2 import box_around, crop_volume, pack_regions, unpack_regions, write_entry
from cache_v2 import PreparedCase, clear_cache, open_entry, prepare_case, prepare_cases
from cases_v2 import Case, load_case, regions_from_labels
from dataset_balance_v2 import BalanceConfig, main
from layouts_v2 import find_cases
from volumes_v2 import BRAIN_SLICE_VOXELS, gather_slab, normalise_volume

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
    return find_cases(tmp_path / "in")[0]


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def prepare(case: Case, cache: Path) -> PreparedCase:
    return prepare_case(case, ("flair",), ("WT", "ET"), cache)


def entries(cache: Path) -> set[str]:
    """Return the names of everything in the cache's entries, hidden ones too."""
    return {path.name for path in (cache / "entries").iterdir()}


def stored(volume: np.ndarray, reference: np.ndarray, folder: Path) -> PreparedCase:
    """Return the prepared case of an entry written from arrays."""
    facts = {"spacing_mm": (1, 1, 1), "fingerprint": {}, "brain_voxels": [0] * volume.shape[1]}
    facts = write_entry(folder, volume, reference, facts | {"region_voxels": reference.sum((2, 3)).tolist()})
    return open_entry(Case("x", "x", "x", "brats2021", "brats", {}, ()), folder, facts)


# ------------------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------------------


def test_a_prepared_case_holds_what_reading_and_normalising_give(case, cache):
    prepared = prepare_case(case, ("flair", "t1"), ("WT", "ET"), cache)
    loaded = load_case(case, ("flair", "t1"))
    scores, brain_voxels = normalise_volume(loaded.volume)
    assert prepared.volume.dtype == np.float16
    assert (prepared.volume.astype(np.float32).view(np.int32) == scores.view(np.int32)).all()  # bit for bit
    assert prepared.reference.dtype == np.bool_
    assert (prepared.reference == regions_from_labels(loaded.labels, "brats", ("WT", "ET"))).all()
    assert prepared.brain_voxels == tuple(brain_voxels.tolist())
    assert prepared.region_voxels == ((0, 0, 0, 16, 4, 0, 0, 0), (0, 0, 0, 0, 4, 0, 0, 0))
    assert prepared.spacing_mm == (1.0, 1.0, 1.0)
    assert (prepared.case_id, prepared.patient_id, prepared.cohort) == ("x", "x", "in")


@pytest.mark.parametrize("context", [0, 1, 3])
def test_every_slab_is_that_of_the_uncached_volume(case, cache, context):
    prepared = prepare_case(case, ("flair", "t1"), ("WT", "ET"), cache)
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


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
VALUES = st.sampled_from([0.0, -0.0, -4.0, 8.0, 0.333251953125])


@given(data=st.data(), shape=SHAPES, background=VALUES)
def test_cropping_loses_nothing(tmp_path_factory, data, shape, background):
    volume = np.full(shape, background, np.float16)
    reference = np.zeros((2, *shape[1:]), bool)
    for _ in range(data.draw(st.integers(0, 4))):  # a few voxels of their own, so that boxes are smaller
        index = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        volume[index] = data.draw(VALUES)
        reference[(data.draw(st.integers(0, 1)), *index[1:])] = True
    prepared = stored(volume, reference, tmp_path_factory.mktemp("cache") / "entries" / "x")
    assert (prepared.volume.view(np.uint16) == volume.view(np.uint16)).all()
    assert (prepared.reference == reference).all()
    z = data.draw(st.integers(0, shape[1] - 1))
    slab = gather_slab(volume, z, 1).astype(np.float32)
    assert (prepared.slab(z, 1).view(np.int32) == slab.view(np.int32)).all()
    assert (prepared.reference_slice(z) == reference[:, z]).all()


def test_boxes_by_hand():
    mask = np.zeros((4, 5, 6), bool)
    assert box_around(mask) == ((0, 1), (0, 1), (0, 1))
    mask[1, 2, 3] = mask[2, 2, 5] = True
    assert box_around(mask) == ((1, 3), (2, 3), (3, 6))
    volume = np.full((2, 4, 5, 6), -1.5, np.float16)
    volume[1] = 0.25
    volume[0, 3, 1, 1] = 2
    volume[1, 1, 4, 0] = 2
    cropped, box, background = crop_volume(volume)
    assert box == ((1, 4), (1, 5), (0, 2))
    assert background == (-1.5, 0.25)
    assert cropped.shape == (2, 3, 4, 2)


@given(reference=hnp.arrays(bool, st.tuples(st.integers(1, 8), *[st.integers(1, 4)] * 3)))
def test_packed_regions_come_back(reference):
    assert (unpack_regions(pack_regions(reference), len(reference)) == reference).all()


def test_an_entry_holds_the_box_alone(case, cache):
    prepared = prepare(case, cache)
    head = make_head() > 0
    assert prepared.box == box_around(head)
    bytes_in_box = np.prod([end - first for first, end in prepared.box]) * 2
    assert (prepared.folder / "volume.npy").stat().st_size == 128 + bytes_in_box
    assert (prepared.folder / "reference.npy").stat().st_size == 128 + 2 * 4 * 4


def test_changing_a_slab_does_not_change_the_cache(case, cache):
    prepared = prepare(case, cache)
    before = (prepared.folder / "volume.npy").read_bytes()
    prepared.slab(3, 1)[:] = 7
    prepared.volume[:] = 7
    prepared.reference_slice(3)[:] = True
    assert (prepared.folder / "volume.npy").read_bytes() == before
    assert prepared.slab(3, 1).max() != 7


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

    monkeypatch.setattr(cache_v2, "load_case", load_and_note)
    return ids


def test_the_second_time_nothing_is_read(case, cache, decoded, monkeypatch):
    first = prepare(case, cache)
    assert decoded == ["x"]
    monkeypatch.setattr(cache_v2, "file_sha256", None)
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
    renamed = prepare(find_cases(moved)[0], cache)
    assert dataclasses.replace(renamed, case_id="x", patient_id="x", cohort="in") == first
    assert (renamed.case_id, renamed.patient_id, renamed.cohort) == ("y", "y", "elsewhere")
    assert decoded == ["x"]


def test_a_file_rewritten_within_its_size_is_read_anew(cache, tmp_path, write_nifti):
    path = write_nifti(tmp_path / "in" / "x_flair.nii", make_head().transpose(2, 1, 0))
    write_nifti(tmp_path / "in" / "x_seg.nii", np.zeros((40, 40, 8), np.uint8))
    case = find_cases(tmp_path / "in")[0]
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
    folders = {prepare_case(case, *combination, cache).folder for combination in combinations}
    assert len(folders) == len(combinations)
    rgb = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    write_slices(tmp_path / "png", "c", {1: rgb}, {1: np.zeros((12, 12), np.uint8)})
    volumes = [
        prepare_case(find_cases(tmp_path / "png", ("flair",), channel)[0], ("flair",), ("WT",), cache).volume
        for channel in (0, 1)
    ]
    assert (volumes[0] != volumes[1]).any()


def test_another_reading_of_the_same_bytes_has_an_entry_of_its_own(case, cache, write_nifti):
    write_nifti(case.mask[0], np.ones((40, 40, 8), np.uint8))
    binary = dataclasses.replace(case, convention="binary")
    folders = {prepare_case(found, ("flair",), ("WT",), cache).folder for found in (case, binary)}
    assert len(folders) == 2


def test_cases_of_one_id_in_two_cohorts_do_not_share_an_entry(cache, tmp_path, write_nifti):
    # The second is unpacked from an archive: same names, sizes and times, other voxels.
    prepared = []
    for folder, seed in ((tmp_path / "a", 0), (tmp_path / "b", 1)):
        for name, array in (("flair", make_head(seed)), ("seg", np.zeros((8, 40, 40), np.uint8))):
            path = write_nifti(folder / f"x_{name}.nii", array.transpose(2, 1, 0))
            os.utime(path, ns=(10**18, 10**18))
        prepared.append(prepare(find_cases(folder)[0], cache))
    assert (prepared[0].volume != prepared[1].volume).any()


def test_a_resaved_image_is_known_by_its_content(case, cache, tmp_path, write_nifti):
    for name, seed in (("copy", 0), ("other", 7)):
        array = make_head(seed).astype(np.int16).transpose(2, 1, 0)
        write_nifti(tmp_path / name / f"{name}_flair.nii", array)  # not compressed: other bytes
        write_nifti(tmp_path / name / f"{name}_seg.nii", np.zeros((40, 40, 8), np.uint8))
    original, copy, other = (
        prepare(found, cache) for found in (case, *(find_cases(tmp_path / n)[0] for n in ("copy", "other")))
    )
    assert original.folder != copy.folder
    assert original.fingerprint == copy.fingerprint
    assert original.fingerprint != other.fingerprint


# ------------------------------------------------------------------------------------------------------------
# Damage, failures, several writers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["volume.npy", "reference.npy", "facts.json"])
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


@pytest.mark.parametrize("failing", cache_entry_v2.ARRAYS)
def test_a_write_that_fails_leaves_no_entry(case, cache, monkeypatch, failing):
    save = np.save

    def fail(path: Path, *arguments: object) -> None:
        if Path(path).name == failing:
            raise OSError(28, "No space left on device")
        save(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with pytest.raises(OSError, match="No space"):
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

    monkeypatch.setattr(cache_v2, "load_case", read_while_another_prepares)
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

import cache_v2
from cache_v2 import prepare_cases
from layouts_v2 import find_cases
from utils_v2 import InputError

if __name__ == "__main__":
    cohort, cache, workers, how = sys.argv[1:]
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
        cases = prepare_cases(find_cases(cohort), ("flair",), ("WT",), cache, int(workers))
    except InputError as error:
        sys.exit(f"InputError: {error}")
    digest = hashlib.sha256()
    for case in cases:
        digest.update(case.volume.tobytes() + case.reference.tobytes())
    print(json.dumps({"entries": sorted(case.folder.name for case in cases), "pixels": digest.hexdigest()}))
'''


@pytest.fixture
def start(tmp_path, cache):
    """Function (cohort, workers, how) that starts the script on the test's cache."""
    script = tmp_path / "prepare.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = []

    def start_script(cohort: Path, workers: int = 1, how: str = "whole") -> subprocess.Popen[str]:
        command = [sys.executable, script, cohort, cache, str(workers), how]
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
    alone = prepare_cases(find_cases(phantom_cohort), ("flair",), ("WT",), tmp_path / "alone")
    results = [finish(process) for process in [start(phantom_cohort), start(phantom_cohort, workers=2)]]
    assert results[0] == results[1]
    assert results[0]["entries"] == sorted(case.folder.name for case in alone)
    assert entries(cache) == set(results[0]["entries"])
    again = prepare_cases(find_cases(phantom_cohort), ("flair",), ("WT",), cache)
    for one, other in zip(alone, again, strict=True):
        assert (one.volume == other.volume).all()
    assert list(
        (cache / "runs").glob(f".*~{os.getpid()}~*")
    )  # this process holds its entries, those are gone
    assert len(list((cache / "runs").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_what_a_killed_run_left_is_removed_and_what_it_finished_is_kept(
    start, phantom_cohort, cache, decoded
):
    process = start(phantom_cohort, how="killed")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert len(list((cache / "entries").glob(".*"))) == 1  # the half-written second case
    assert len(list((cache / "runs").iterdir())) == 1
    cases = find_cases(phantom_cohort)[:3]
    prepared = prepare_cases(cases, ("flair",), ("WT",), cache)
    assert decoded == ["BraTS2021_90001", "BraTS2021_90002"]
    assert entries(cache) == {case.folder.name for case in prepared}
    assert len(list((cache / "runs").iterdir())) == 1
    assert (prepared[1].volume == normalise_volume(load_case(cases[1]).volume)[0]).all()


def test_an_unreadable_case_is_an_input_error_in_a_process_of_its_own_too(start, phantom_cohort, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(phantom_cohort, broken)
    path = next(broken.glob("*90003/*_flair.nii.gz"))
    path.write_bytes(path.read_bytes()[:-100])
    process = start(broken, workers=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(rf"^InputError: {re.escape(str(path))}: truncated or damaged", errors, re.M)
    assert "Traceback" not in errors


# ------------------------------------------------------------------------------------------------------------
# The limit, and the end
# ------------------------------------------------------------------------------------------------------------


def size_gb(cache: Path) -> float:
    return sum(path.stat().st_size for path in (cache / "entries").rglob("*") if path.is_file()) / 1e9


def forget_this_run(cache: Path) -> None:
    """Let the entries of the cache look like those of a run that ended."""
    for path in (cache / "runs").iterdir():
        path.unlink()


def test_entries_unused_longest_go_first_and_none_that_is_needed(phantom_cohort, cache, capsys, input_error):
    cases = find_cases(phantom_cohort)
    first = prepare_cases(cases[:4], ("flair",), ("WT",), cache)
    assert re.search(r"^cache: 4 cases, [\d.]+ GB, 4 made now; .* of 50 GB$", capsys.readouterr().out, re.M)
    for age, case in zip((300, 100, 400, 200), first, strict=True):
        os.utime(case.folder / "facts.json", (1e9 - age, 1e9 - age))
    forget_this_run(cache)
    limit = size_gb(cache) * 1.02  # equal phantoms differ by the size of their boxes
    second = prepare_cases([cases[2], cases[4], cases[5]], ("flair",), ("WT",), cache, cache_gb=limit)
    kept = entries(cache)
    assert size_gb(cache) <= limit
    assert {case.folder.name for case in second} <= kept
    assert first[0].folder.name not in kept  # unused longest of those not needed
    assert first[1].folder.name in kept  # used last
    stamps = {path.read_text() for path in (cache / "stamps").iterdir()}
    assert stamps == kept
    with input_error("--cache-gb", "2 cases", "running commands"):  # this run holds the second lot
        prepare_cases(cases[6:8], ("flair",), ("WT",), cache, cache_gb=size_gb(cache) * 1.02)
    assert {case.folder.name for case in second} <= entries(cache)


def test_what_another_run_needs_stays(phantom_cohort, cache, input_error):
    cases = find_cases(phantom_cohort)
    held = prepare_cases(cases[:3], ("flair",), ("WT",), cache)
    (own,) = (cache / "runs").iterdir()
    own.rename(own.with_name(own.name.replace(f"~{os.getpid()}~", f"~{os.getppid()}~")))  # another, alive
    cache_v2._RUNS.clear()
    with input_error("--cache-gb", "taken by running commands"):
        prepare_cases(cases[3:5], ("flair",), ("WT",), cache, cache_gb=size_gb(cache) * 1.1)
    assert {case.folder.name for case in held} <= entries(cache)
    with input_error("--cache-dir", "wait"):
        clear_cache(cache)
    assert {case.folder.name for case in held} <= entries(cache)


def test_cases_that_do_not_fit_are_told_before_all_are_built(phantom_cohort, cache, input_error, decoded):
    with input_error("--cache-gb 1e-06", "8 cases", "raise the limit"):
        prepare_cases(find_cases(phantom_cohort), ("flair",), ("WT",), cache, cache_gb=1e-6)
    assert len(decoded) == 1
    with input_error("--cache-gb 1e-06"):  # known at once
        prepare_cases(find_cases(phantom_cohort)[:1], ("flair",), ("WT",), cache, cache_gb=1e-6)
    assert len(decoded) == 1


def test_a_full_disk_is_told_before_all_are_built(phantom_cohort, cache, input_error, monkeypatch):
    monkeypatch.setattr(cache_v2, "CASES_TO_ESTIMATE", 2)
    usage = shutil.disk_usage(phantom_cohort)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with input_error("--cache-dir", cache, "1e-05 GB to spare"):
        prepare_cases(find_cases(phantom_cohort), ("flair",), ("WT",), cache)
    assert len(entries(cache)) == 2


def test_the_command_removes_the_cache_and_nothing_else(case, cache, capsys, input_error, tmp_path):
    prepare_cases([case], ("flair",), ("WT",), cache)
    (cache / "notes.txt").write_text("mine")
    main(BalanceConfig(cache_dir=str(cache), clear_cache=True))
    assert "removed" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]
    with input_error("--cache-dir", tmp_path / "in"):
        clear_cache(tmp_path / "in")
    assert len(list((tmp_path / "in").iterdir())) == 3
    assert clear_cache(tmp_path / "nowhere") == 0
    (cache / "notes.txt").unlink()
    prepare_cases([case], ("flair",), ("WT",), cache)
    (cache / "fingerprints" / "x.json").write_text("{}")
    assert clear_cache(cache) > 0
    assert not cache.exists()


def test_prepared_phantoms_have_brain_tumour_and_slices_without_brain(phantom_cohort, cache):
    prepared = prepare_cases(find_cases(phantom_cohort)[:2], ("flair",), ("WT",), cache)
    assert [case.case_id for case in prepared] == ["BraTS2021_90000", "BraTS2021_90001"]
    for case in prepared:
        assert case.spacing_mm == (10.0, 5.0, 5.0)
        assert max(case.brain_voxels) > 400
        assert min(case.brain_voxels) < BRAIN_SLICE_VOXELS
        assert 0 < sum(case.region_voxels[0]) < sum(case.brain_voxels) / 3
