"""The slice balance, slabs and their augmentation, and batches that no number of workers changes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import dataset_balance_v2
from cohort.augmentation import BiasField, TumourContrast
from cohort.cache import PreparedCase, open_entry, write_entry
from cohort.cases import Case
from cohort.layouts import CaseSource
from cohort.preprocess import Z_RANGE, fit_slices, gather_slab, place_slices
from dataset_balance_v2 import (
    BalanceConfig,
    BalancedSampler,
    SlabDataset,
    balance_slices,
    make_train_loader,
    reference_range,
    slice_kind,
    slice_table,
    training_spacing,
    warn_of_crop,
)

REPOSITORY = Path(__file__).resolve().parent.parent
LOW, HIGH = Z_RANGE

# ------------------------------------------------------------------------------------------------------------
# Balance
# ------------------------------------------------------------------------------------------------------------


def prepared(brain_voxels: tuple[int, ...], region_voxels: tuple[tuple[int, ...], ...]) -> PreparedCase:
    """Return a case of counts alone."""
    box = ((0, 1), (0, 1), (0, 1))
    counts = (brain_voxels, region_voxels)
    return PreparedCase("x", "x", "made", (), Path(), (1, 1, 1), {}, *counts, (1, 1, 1), box, box, (0.0,))


def store(folder: Path, volume: np.ndarray, reference: np.ndarray) -> PreparedCase:
    """Return the prepared case of these arrays, with 500 brain voxels a slice."""
    masks = np.concatenate([np.zeros_like(reference[:1]), reference])
    facts = write_entry(folder / "entry", volume, masks, (1, 1, 1), {})
    facts["brain_voxels"] = [500] * volume.shape[1]
    return open_entry(Case("x", "x", "made", "brats2021", "brats", {}, ()), folder / "entry", facts)


def test_slice_table_by_hand():
    cases = [
        prepared((0, 63, 64), ((0, 0, 5), (0, 0, 2))),
        prepared((64, 10), ((0, 3), (0, 0))),
    ]
    table = slice_table(cases, ("WT", "ET"))
    assert table.to_dict("list") == {
        "case": [0, 0, 0, 1, 1],
        "z": [0, 1, 2, 0, 1],
        "brain_voxels": [0, 63, 64, 64, 10],
        "WT": [0, 0, 5, 0, 3],
        "ET": [0, 0, 2, 0, 0],
    }
    # Tumour counts before brain; a slice with fewer than 64 brain voxels is empty.
    assert slice_kind(table).tolist() == ["empty", "empty", "tumour", "brain", "tumour"]


def table_of_kinds(kinds: list[str]) -> pd.DataFrame:
    """Return a slice table of slices of the given kinds."""
    return pd.DataFrame(
        {
            "case": 0,
            "z": np.arange(len(kinds)),
            "brain_voxels": [0 if kind == "empty" else 500 for kind in kinds],
            "WT": [7 if kind == "tumour" else 0 for kind in kinds],
            "TC": 0,
        }
    )


def test_any_region_makes_a_tumour_slice():
    table = table_of_kinds(["brain", "brain"])
    table.loc[1, "TC"] = 1
    assert slice_kind(table).tolist() == ["brain", "tumour"]


def test_weights_by_hand():
    weights = balance_slices(table_of_kinds(["tumour", "brain", "brain", "empty", "brain", "tumour"]))
    np.testing.assert_allclose(weights, [0.25, 0.16, 0.16, 0.02, 0.16, 0.25])


SHARES = {"tumour": 0.5, "brain": 0.48, "empty": 0.02}


@given(kinds=st.lists(st.sampled_from(sorted(SHARES)), min_size=1, max_size=60))
def test_kinds_are_drawn_by_their_shares_and_slices_of_a_kind_alike(kinds):
    weights = balance_slices(table_of_kinds(kinds))
    assert weights.shape == (len(kinds),)
    assert abs(weights.sum() - 1) < 1e-9
    present = sum(SHARES[kind] for kind in set(kinds))
    for kind, count in Counter(kinds).items():
        of_kind = weights[np.array(kinds) == kind]
        np.testing.assert_allclose(of_kind, SHARES[kind] / present / count)


def test_other_shares_are_kept():
    kinds = ["tumour", "brain", "empty", "empty"]
    weights = balance_slices(table_of_kinds(kinds), tumour_share=0.8, empty_share=0.0)
    np.testing.assert_allclose(weights, [0.8, 0.2, 0, 0])


def test_slices_that_no_share_allows_are_an_error():
    with pytest.raises(ValueError, match="--empty-share"):
        balance_slices(table_of_kinds(["empty", "empty"]), tumour_share=0.5, empty_share=0.0)


@pytest.mark.parametrize(("tumour_share", "empty_share"), [(0.9, 0.2), (1.5, 0.0), (-0.1, 0.02), (0.5, -0.5)])
def test_shares_that_are_no_shares_are_an_error(tumour_share, empty_share):
    with pytest.raises(ValueError, match="share"):
        balance_slices(table_of_kinds(["tumour", "brain", "empty"]), tumour_share, empty_share)


# ------------------------------------------------------------------------------------------------------------
# Slabs and augmentation
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def patterned(tmp_path) -> PreparedCase:
    """Case of 4 modalities, 5 slices, all equal: an L that no flip keeps, as bright as can be on dark."""
    pattern = np.zeros((60, 50), bool)
    pattern[14:40, 15:23] = pattern[32:40, 15:38] = True
    volume = np.where(pattern, HIGH, LOW).astype(np.float16)
    shape = (5, 60, 50)
    return store(tmp_path, np.broadcast_to(volume, (4, *shape)), np.broadcast_to(pattern, (2, *shape)))


@pytest.fixture
def random_case(tmp_path) -> PreparedCase:
    """Case of 2 modalities and 2 regions, 6 slices of 40 x 90, of random values."""
    generator = np.random.default_rng(0)
    volume = generator.uniform(-3, 6, (2, 6, 40, 90)).astype(np.float16)
    return store(tmp_path / "random", volume, generator.random((2, 6, 40, 90)) < 0.3)


@pytest.mark.parametrize("size", [32, 80, 96])  # resized, cropped, padded
def test_without_augmentation_a_slab_is_what_prediction_sees(random_case, size):
    dataset = SlabDataset([random_case], slice_table([random_case], ("WT", "TC")), 1, size, augment=False)
    placement = place_slices(40, 90, size)
    assert len(dataset) == 6
    for row in (0, 3, 5):
        slab, target = dataset[row, 1234]
        assert (slab.dtype, target.dtype) == (torch.float32, torch.float32)
        assert slab.shape == (6, size, size)
        expected = fit_slices(gather_slab(random_case.volume, row, 1).astype(np.float32), placement)
        assert (slab.numpy() == expected).all()
        expected = fit_slices(random_case.reference[:, row], placement, is_mask=True)
        assert (target.numpy() == expected).all()


@pytest.mark.parametrize(
    ("tumour", "size", "enough"),
    [
        ((8, 40), 64, None),  # columns 8 to 72 are kept of 80
        ((7, 40), 64, 80),
        ((8, 72), 64, None),
        ((8, 73), 64, 80),
        ((0, 80), 80, None),
        ((0, 80), 63, None),  # 80 is above 1.25 x 63: resized as a whole
    ],
)
def test_a_crop_that_cuts_tumour_off_is_logged(tmp_path, caplog, tumour, size, enough):
    reference = np.zeros((1, 3, 40, 80), bool)
    reference[:, 1, 5:9, tumour[0] : tumour[1]] = True
    case = store(tmp_path / "wide", np.zeros((1, 3, 40, 80), np.float16), reference)
    healthy = store(tmp_path / "healthy", np.zeros((1, 3, 40, 80), np.float16), reference & False)
    warn_of_crop([healthy, case], size)
    warning = f"--size {size} cuts tumour off 1 of 2 cases, first x; --size {enough} keeps it"
    assert caplog.messages == ([] if enough is None else [warning])
    fitted = fit_slices(reference[:, 1], place_slices(40, 80, size), is_mask=True)
    if size != 63:
        assert bool(caplog.messages) == (fitted.sum() < reference.sum())


def test_training_slabs_are_cropped_around_the_head(tmp_path, caplog):
    # The head is columns 0 to 50 of 80: the middle 64 columns begin at 8 and would cut its tumour.
    masks = np.zeros((2, 3, 40, 80), bool)
    masks[0, :, 5:35, 0:50] = True
    masks[1, 1, 8:12, 2:10] = True
    volume = np.where(masks[:1], np.float16(1), np.float16(-2))
    facts = write_entry(tmp_path / "entry", volume, masks, (4, 1, 1), {})
    case = open_entry(Case("x", "x", "made", "brats2021", "brats", {}, ()), tmp_path / "entry", facts)
    assert case.head_box == ((5, 35), (0, 50))
    warn_of_crop([case], 64)
    assert caplog.messages == []
    _, target = SlabDataset([case], slice_table([case], ("WT",)), 1, 64, augment=False)[1, 0]
    assert target.sum() == masks[1].sum()
    assert np.argwhere(target[0].numpy() > 0)[0].tolist() == [8 + 12, 2]  # 12 rows of padding, from column 0


def test_the_spacing_of_training_is_as_the_network_sees_it(tmp_path):
    reference = np.zeros((1, 1, 40, 80), bool)
    case = store(tmp_path, np.zeros((1, 1, 40, 80), np.float16), reference)  # at 1 mm
    assert training_spacing([case], 80)["in_plane"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert training_spacing([case], 40)["in_plane"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert training_spacing([dataclasses.replace(case, spacing_known=False)], 80) is None


def test_the_size_advised_keeps_tumour_of_cases_that_were_resized_before(tmp_path, caplog):
    cases = []
    for side in (70, 85):  # 85 is above 1.25 x 64, and not above 1.25 x 80
        reference = np.ones((1, 1, side, side), bool)
        cases.append(store(tmp_path / str(side), np.zeros((1, 1, side, side), np.float16), reference))
    warn_of_crop(cases, 64)
    warn_of_crop(cases, 64, multiple=64)
    warn_of_crop(cases, 96)
    first, second = caplog.messages
    assert "1 of 2 cases, first x; --size 96 keeps it" in first
    assert "--size 128 keeps it" in second


def test_the_target_is_that_of_the_middle_slice(tmp_path):
    volume = np.arange(4, dtype=np.float16).reshape(1, 4, 1, 1) * np.ones((1, 1, 8, 8), np.float16)
    case = store(tmp_path, volume, volume == 2)
    dataset = SlabDataset([case], slice_table([case], ("WT",)), 1, 8, augment=False)
    assert [dataset[row, 0][1].mean().item() for row in range(4)] == [0, 0, 1, 0]
    assert dataset[2, 0][0][:, 0, 0].tolist() == [1, 2, 3]


def test_what_comes_out_depends_on_the_key_alone(random_case):
    table = slice_table([random_case], ("WT", "TC"))
    dataset = SlabDataset([random_case], table, 1, 96)
    keys = [(2, 11), (2, 12), (4, 11), (0, 99)]
    first = [dataset[key] for key in keys]
    other = SlabDataset([random_case], table, 1, 96)
    np.random.seed(5)  # noqa: NPY002  what another library may do in between
    again = [other[key] for key in reversed(keys)][::-1]
    for (slab, target), (slab_again, target_again) in zip(first, again, strict=True):
        assert torch.equal(slab, slab_again)
        assert torch.equal(target, target_again)
    assert not torch.equal(first[0][0], first[1][0])


def test_augmentation_moves_all_slices_and_the_target_alike(patterned):
    dataset = SlabDataset([patterned], slice_table([patterned], ("WT", "TC")), 1, 64)
    for transform in dataset.augmentation.transforms:
        if isinstance(transform, BiasField | TumourContrast):
            transform.p = 0  # the pattern is the tumour, and would go with its contrast or fade in the field
    plain = fit_slices(patterned.reference[0, 2], place_slices(60, 50, 64), is_mask=True)
    moved = 0
    for seed in range(60):
        slab, target = (tensor.numpy() for tensor in dataset[2, seed])
        assert slab.shape == (12, 64, 64)  # more channels than OpenCV warps at once
        assert set(np.unique(target)) <= {0.0, 1.0}
        assert (target[0] == target[1]).all()
        mask = target[0] > 0
        inside, outside = ndimage.binary_erosion(mask, iterations=2), ~ndimage.binary_dilation(mask, None, 2)
        assert inside.sum() > 50
        # Bright and dark stay apart under every change of contrast, so each slice still shows the pattern;
        # interpolation may blur its edge by two pixels.
        assert (slab[:, inside] > (LOW + HIGH) / 2).all()
        assert (slab[:, outside] < (LOW + HIGH) / 2).all()
        moved += (mask != plain).sum() > 50
    assert 30 < moved < 60  # most draws change the geometry, some leave it


def test_augmentation_changes_intensities_within_their_range(patterned):
    dataset = SlabDataset([patterned], slice_table([patterned], ("WT", "TC")), 1, 64)
    slabs = np.stack([dataset[2, seed][0].numpy() for seed in range(40)])
    assert np.isfinite(slabs).all()
    assert slabs.min() >= LOW - 1e-5
    assert slabs.max() <= HIGH + 1e-5
    spread = slabs.max((1, 2, 3)) - slabs.min((1, 2, 3))
    assert (spread < 0.99 * (HIGH - LOW)).any()  # contrast
    differing = np.abs(slabs[:, 0] - slabs[:, 1]).max((1, 2))
    assert (differing > 0).any()  # noise of its own in each slice
    assert (differing == 0).any()


def test_air_that_resizing_rounds_below_its_range_stays_a_number(random_case):
    dataset = SlabDataset([random_case], slice_table([random_case], ("WT", "TC")), 1, 96)
    slab = np.full((6, 96, 96), np.nextafter(np.float32(LOW), np.float32(-9)))
    slab[:, 20:60, 20:60] = np.random.default_rng(0).uniform(LOW, HIGH, (6, 40, 40))
    target = np.ones((2, 96, 96), np.uint8)
    for seed in range(40):
        assert np.isfinite(dataset.augment(slab.copy(), target, seed)[0]).all()


def test_the_case_on_disk_is_not_changed_by_augmentation(patterned):
    before = (patterned.folder / "volume.npy").read_bytes()
    dataset = SlabDataset([patterned], slice_table([patterned], ("WT", "TC")), 1, 64)
    for seed in range(5):
        dataset[0, seed]
    assert (patterned.folder / "volume.npy").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------
# Sampler and loader
# ------------------------------------------------------------------------------------------------------------


def test_the_sampler_draws_by_weight_and_anew_in_each_epoch():
    weights = balance_slices(table_of_kinds(["tumour"] * 10 + ["brain"] * 100 + ["empty"] * 50))
    sampler = BalancedSampler(weights, 20_000, seed=3)
    assert len(sampler) == 20_000
    first = list(sampler)
    assert first == list(sampler)  # the same epoch again
    rows = np.array(first)[:, 0]
    for start, stop, share in ((0, 10, 0.5), (10, 110, 0.48), (110, 160, 0.02)):
        assert abs(((rows >= start) & (rows < stop)).mean() - share) < 0.015  # 4 SD
    assert len({seed for _, seed in first}) > 19_900  # a slice drawn twice is augmented twice
    sampler.epoch = 1
    second = list(sampler)
    assert second != first
    assert list(BalancedSampler(weights, 20_000, seed=4)) not in (first, second)


def test_the_loader_drops_a_last_short_batch(random_case):
    dataset = SlabDataset([random_case], slice_table([random_case], ("WT", "TC")), 1, 96, augment=False)
    sampler = BalancedSampler(np.full(6, 1 / 6), 11, seed=0)
    loader = make_train_loader(dataset, sampler, 4)
    keys = list(sampler)
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    assert [tuple(slab.shape) for slab, _ in batches] == [(4, 6, 96, 96)] * 2
    assert torch.equal(batches[1][0][0], dataset[keys[4]][0])
    assert torch.equal(batches[1][1][3], dataset[keys[7]][1])


LOADER_SCRIPT = '''
"""Print a SHA-256 of all batches of two epochs for each kind of worker."""

import hashlib
import json
import sys

from cohort.cache import prepare_cases
from dataset_balance_v2 import BalancedSampler, SlabDataset, balance_slices, make_train_loader, slice_table
from cohort.layouts import CaseSource, find_cases

if __name__ == "__main__":
    cases = prepare_cases(find_cases(CaseSource(sys.argv[1]))[:3], ("flair",), ("WT",), sys.argv[2])
    table = slice_table(cases, ("WT",))
    hashes = {}
    for name, workers, start_method in (("none", 0, None), ("fork", 2, "fork"), ("spawn", 2, "spawn")):
        sampler = BalancedSampler(balance_slices(table), 20, seed=7)
        loader = make_train_loader(SlabDataset(cases, table, 1, 48), sampler, 4, workers, start_method)
        hashes[name] = []
        for epoch in (0, 1):
            sampler.epoch = epoch
            digest = hashlib.sha256()
            for slab, target in loader:
                digest.update(slab.numpy().tobytes() + target.numpy().tobytes())
            hashes[name].append(digest.hexdigest())
    print(json.dumps(hashes))
'''


def run_python(*arguments: str | Path, timeout_s: int = 120) -> subprocess.CompletedProcess[str]:
    """Run Python on a script with the repository's modules importable; never hangs."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_batches_are_the_same_whatever_the_workers(phantom_cohort, tmp_path):
    script = tmp_path / "batches.py"  # spawned workers import the main script: it must be one of its own
    script.write_text(LOADER_SCRIPT)
    done = run_python(script, phantom_cohort, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    hashes = json.loads(done.stdout.splitlines()[-1])
    assert hashes["none"] == hashes["fork"] == hashes["spawn"]
    assert hashes["none"][0] != hashes["none"][1]


# ------------------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------------------


def count_kinds(cohort: Path) -> dict[str, int]:
    """Count the slices of each kind from the files; the background of a phantom is 0 and nothing else is."""
    counts = dict.fromkeys(("tumour", "brain", "empty"), 0)
    for path in cohort.glob("*/*_seg.nii.gz"):
        tumour = np.asanyarray(nib.load(path).dataobj).any((0, 1))
        flair = np.asanyarray(nib.load(str(path).replace("_seg", "_flair")).dataobj)
        bright = flair > 0.1 * np.percentile(flair[flair > 0], 99.5)
        brain = bright.sum((0, 1)) >= 64
        counts["tumour"] += int(tumour.sum())
        counts["brain"] += int((brain & ~tumour).sum())
        counts["empty"] += int((~brain & ~tumour).sum())
    return counts


def test_the_command_prints_and_draws_the_balance_before_and_after(phantom_cohort, tmp_path):
    plot = tmp_path / "out" / "balance.png"
    command = ("--data-dir", phantom_cohort, "--output", plot, "--cache-dir", tmp_path / "cache")
    done = run_python(REPOSITORY / "dataset_balance_v2.py", *command)
    assert done.returncode == 0, done.stderr
    assert "8 cases of 8 patients, 128 slices" in done.stdout
    rows = {
        name: re.search(rf"^{name} +(\d+) +([\d.]+)% +([\d.]+)%$", done.stdout, re.M).groups()
        for name in ("tumour", "brain", "empty")
    }
    counts = count_kinds(phantom_cohort)
    assert min(counts.values()) > 0
    assert {name: int(row[0]) for name, row in rows.items()} == counts
    for name, (_, stored, drawn) in rows.items():
        assert abs(float(stored) - 100 * counts[name] / 128) < 0.051
        assert float(drawn) == 100 * SHARES[name]
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_the_plot_shows_what_is_printed(phantom_cohort, tmp_path, monkeypatch, input_error):
    drawn = []

    def draw(before, after, path):
        drawn.extend((before, after))
        path.write_bytes(b"plot")

    monkeypatch.setattr(dataset_balance_v2, "plot_balance", draw)
    config = BalanceConfig(CaseSource(str(phantom_cohort)), cache_dir=str(tmp_path), tumour_share=0.25)
    config = dataclasses.replace(config, output=str(tmp_path / "x.png"))
    dataset_balance_v2.main(config)
    before, after = drawn
    counts = count_kinds(phantom_cohort)
    assert before.to_dict() == {name: count / 128 for name, count in counts.items()}
    assert after.round(9).to_dict() == {"tumour": 0.25, "brain": 0.73, "empty": 0.02}
    assert (tmp_path / "x.png").read_bytes() == b"plot"
    dataset_balance_v2.main(config)  # over its own plot
    (tmp_path / "x.png").write_bytes(b"another's")
    with input_error(tmp_path / "x.png", "--overwrite"):
        dataset_balance_v2.main(config)
    dataset_balance_v2.main(dataclasses.replace(config, overwrite=True))
    assert (tmp_path / "x.png").read_bytes() == b"plot"


def test_the_command_ends_bad_input_with_one_sentence(tmp_path):
    done = run_python(REPOSITORY / "dataset_balance_v2.py", "--data-dir", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_range_of_reference_volumes_leaves_empty_ones_out():
    # 2 x 1 x 1 mm: 0.002 ml a voxel. WT 30, 0 and 500 voxels; TC nowhere.
    cases = [
        types.SimpleNamespace(spacing_mm=(2.0, 1.0, 1.0), region_voxels=((10, voxels), (0, 0)))
        for voxels in (20, 490)
    ]
    cases.append(types.SimpleNamespace(spacing_mm=(9.0, 9.0, 9.0), region_voxels=((0, 0), (0, 0))))
    assert reference_range(cases, ("WT", "TC")) == {"WT": pytest.approx([0.06, 1.0])}
