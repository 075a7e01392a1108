"""Modalities left out in training, and cases that lack some at test."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.inputs import choose_inputs, read_case
from cohort.cache import find_key, prepare_cases
from cohort.cases import load_case
from cohort.inputs import find_readable
from cohort.layouts import CaseSource, find_cases
from cohort.preprocess import MISSING, Z_RANGE, normalise_volume, place_modalities
from cohort.selection import TrainingSource
from dataset_balance_v2 import BalancedSampler, SlabDataset, drop_modalities, make_train_loader, slice_table
from export_v2 import describe_checkpoint
from inference_v2 import InferenceConfig, TrainedModel
from training.settings import TrainConfig
from training.start import place_run

FOUR = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def lacking(phantom_cohort, tmp_path) -> Path:
    """A cohort of three phantoms: one lacks FLAIR, one all but T2, one nothing."""
    for name, gone in zip(
        sorted(path.name for path in phantom_cohort.iterdir()), (("flair",), FOUR[:3], ()), strict=False
    ):
        shutil.copytree(phantom_cohort / name, tmp_path / "lacking" / name)
        for modality in gone:
            (tmp_path / "lacking" / name / f"{name}_{modality}.nii.gz").unlink()
    return tmp_path / "lacking"


def model_of(modality_dropout: float, modalities: tuple[str, ...] = FOUR) -> TrainedModel:
    """Return a model without a network, for what asks which cases it takes."""
    checkpoint = {"config": {"modality_dropout": modality_dropout}}
    return TrainedModel(None, modalities, ("WT",), 1, 48, (0.5,), torch.device("cpu"), None, checkpoint)


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def test_a_modality_goes_in_all_its_slices_and_one_always_stays():
    counts, stayed = Counter(), Counter()
    for seed in range(4000):
        slab = np.arange(1.0, 5.0).repeat(3)[:, None, None] * np.ones((12, 2, 2))
        drop_modalities(slab, 4, 0.5, seed)
        modalities = slab.reshape(4, 12)
        assert all((row == value).all() or (row == MISSING).all() for value, row in enumerate(modalities, 1))
        kept = np.flatnonzero(modalities[:, 0] != MISSING)
        counts[len(kept)] += 1
        if len(kept) == 1:
            stayed[kept[0]] += 1
    # of 16 ways to drop, 6 leave two, 4 leave one and so does the one that would leave none
    assert [counts[n] / 4000 for n in range(5)] == pytest.approx(
        [0, 5 / 16, 6 / 16, 4 / 16, 1 / 16], abs=0.03
    )
    assert min(stayed.values()) > 0.2 * sum(stayed.values())


def test_what_is_dropped_is_as_dark_as_air_and_depends_on_the_draw_alone(phantom_cohort, tmp_path):
    assert Z_RANGE[0] == MISSING
    cases = prepare_cases(find_cases(CaseSource(str(phantom_cohort)), FOUR)[:2], FOUR, ("WT",), tmp_path)
    table = slice_table(cases, ("WT",))
    whole = SlabDataset(cases, table, 1, 48)
    some = SlabDataset(cases, table, 1, 48, modality_dropout=0.5)
    dropped = 0
    for key in [(row, 1000 + row) for row in range(0, len(table), 3)]:
        slab, target = some[key]
        expected, expected_target = whole[key]
        assert torch.equal(target, expected_target)
        for own, usual in zip(slab.split(3), expected.split(3), strict=True):
            assert torch.equal(own, usual) or (own == MISSING).all()
            dropped += not torch.equal(own, usual)
        assert torch.equal(some[key][0], slab)
    assert dropped > 0
    sampler = BalancedSampler(np.full(len(table), 1 / len(table)), 8, 3)
    batches = [[slab for slab, _ in make_train_loader(some, sampler, 4, workers)] for workers in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_dropout_needs_more_than_one_modality(input_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = TrainConfig(source=TrainingSource("data"), modality_dropout=0.2)
    with input_error("--modality-dropout 0.2", "--modalities"):
        place_run(settings)
    assert place_run(dataclasses.replace(settings, modality_dropout=0.0)).run.startswith("data_2")
    two = dataclasses.replace(settings, source=TrainingSource("data", modalities=("flair", "t1")))
    assert place_run(two).modality_dropout == 0.2


# ------------------------------------------------------------------------------------------------------------
# Cases that lack modalities
# ------------------------------------------------------------------------------------------------------------


def test_only_a_network_trained_without_some_takes_cases_without_some(lacking, input_error):
    ids = [path.name for path in sorted(lacking.iterdir())]
    source = CaseSource(str(lacking))
    with input_error(ids[0], "flair"):
        find_cases(source, FOUR)
    assert [case.case_id for case in find_cases(source, FOUR, partial=True)] == ids
    cases, errors = find_readable([str(lacking)], CaseSource(), FOUR)
    assert [case.case_id for case in cases] == ids[2:]
    assert [name for name, _ in errors] == ids[:2]
    assert find_readable([str(lacking)], CaseSource(), FOUR, partial=True)[1] == []
    # one of the network's modalities must be there
    cases, errors = find_readable([str(lacking)], CaseSource(), FOUR[:3], partial=True)
    assert ([case.case_id for case in cases], [name for name, _ in errors]) == ([ids[0], ids[2]], [ids[1]])
    with input_error(ids[1]):
        find_cases(source, FOUR[:3], partial=True)


@pytest.mark.parametrize(("modality_dropout", "taken"), [(0.0, 1), (0.3, 3)])
def test_the_checkpoint_says_whether_the_command_takes_them(lacking, modality_dropout, taken):
    failed = []
    cases = choose_inputs(
        InferenceConfig(input=(str(lacking),)), model_of(modality_dropout), Path("x"), failed
    )
    assert len(cases) == taken
    assert len(failed) == 3 - taken


def test_checkpoints_that_do_not_say_it_take_whole_cases_alone():
    assert not dataclasses.replace(model_of(0), checkpoint={"config": {}}).is_partial
    assert not dataclasses.replace(model_of(0), checkpoint={"spacing_mm": None}).is_partial
    config = {"modalities": FOUR, "regions": ("WT",), "context": 1, "size": 48, "widths": (4, 8)}
    assert "modality_dropout" not in describe_checkpoint(Path(__file__), {"config": config})["config"]
    exported = describe_checkpoint(Path(__file__), {"config": config | {"modality_dropout": 0.3}})
    assert dataclasses.replace(model_of(0), checkpoint=exported).is_partial


def test_what_is_missing_is_filled_and_the_rest_is_normalised_as_ever(lacking, phantom_cohort, tmp_path):
    case = find_cases(CaseSource(str(lacking)), FOUR, partial=True)[0]
    whole = find_cases(CaseSource(str(phantom_cohort)), FOUR)[0]
    assert case.case_id == whole.case_id
    read = read_case(case, FOUR)
    expected, _ = normalise_volume(load_case(whole, FOUR).volume)
    assert (read.volume[0] == MISSING).all()
    assert np.array_equal(read.volume[1:], expected[1:])
    _, brain = normalise_volume(load_case(whole, ("t1",)).volume)  # the first that is there
    assert np.array_equal(read.brain_voxels, brain.sum((1, 2)))
    assert read.warnings[0] == "flair is missing and filled as --modality-dropout did in training"
    assert np.array_equal(read.intensities, load_case(whole, ("t1",)).volume[0])

    (prepared,) = prepare_cases([case], FOUR, ("WT",), tmp_path / "cache")
    assert np.array_equal(prepared.volume.astype(np.float32), read.volume)
    assert np.array_equal(prepared.brain, brain)
    assert prepared.head_box == read.frame.head
    assert prepared.missing == ("flair",)
    assert prepared.warnings[0] == read.warnings[0]
    assert np.array_equal(prepared.slab(8, 1)[:3], np.full((3, 48, 48), MISSING))
    (complete,) = prepare_cases([whole], FOUR, ("WT",), tmp_path / "cache")
    assert complete.missing == ()
    assert find_key(case, FOUR, ("WT",), tmp_path / "cache") != find_key(
        whole, FOUR, ("WT",), tmp_path / "cache"
    )


def test_a_case_with_all_its_modalities_is_passed_on_as_it_is():
    volume = np.zeros((2, 1, 1, 1), np.float32)
    assert place_modalities(volume, ["t1", "t2"], ("t1", "t2")) is volume
    placed = place_modalities(np.full((1, 2, 2, 2), 3.0, np.float32), ["t2"], ("t1", "t2"))
    assert placed.dtype == np.float32
    assert (placed[0] == MISSING).all()
    assert (placed[1] == 3).all()
