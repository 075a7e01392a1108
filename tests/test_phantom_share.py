"""Phantoms trained on beside the cases: how often they are drawn, and that they stay out of the rest."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import train_drunet_v2 as train
from cohort import phantom, selection
from cohort.cache import prepare_cases
from cohort.layouts import CaseSource, find_cases
from cohort.selection import TrainingSource, prepare_phantoms
from dataset_balance_v2 import balance_phantoms, median_pixel_mm
from runtime import cpu_threads


@pytest.fixture
def two_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """One phantom of each style is enough."""
    monkeypatch.setattr(phantom, "TRAINING_PHANTOMS", 1)


def test_phantoms_are_drawn_as_often_as_their_share_and_balanced_by_themselves() -> None:
    table = pd.DataFrame(
        {"case": [0, 0, 1, 1, 1], "z": [0, 1, 0, 1, 2], "brain_voxels": [500] * 5, "WT": [9, 0, 9, 0, 0]}
    )
    weights = balance_phantoms(table, np.array([0.25, 0.75]), 0.4, tumour_share=0.5, empty_share=0.0)
    np.testing.assert_allclose(weights, [0.15, 0.45, 0.2, 0.1, 0.1])


@pytest.mark.usefixtures("two_phantoms")
def test_phantoms_to_train_on_are_made_once_and_are_heads_of_their_own(tmp_path: Path) -> None:
    directory = tmp_path / "phantoms"
    phantom.write_training_phantoms(directory, 1.7)
    files = sorted(directory.glob("*/*/*"))
    assert len(files) == 10
    before = [path.stat().st_mtime_ns for path in files]
    phantom.write_training_phantoms(directory, 1.7)
    assert before == [path.stat().st_mtime_ns for path in files]
    next(directory.glob("*/*/*_seg.nii.gz")).unlink()  # as a writer that was killed leaves it
    phantom.write_training_phantoms(directory, 1.7)
    assert sorted(directory.glob("*/*/*")) == files

    phantom.write_cohort(files[0].parents[1], 2, seed=3)  # more lies there than belongs there
    source = TrainingSource(cache_dir=str(tmp_path), modalities=("t1", "flair"), regions=("WT", "ET"))
    first, second = prepare_phantoms(source, 1.7)
    assert (first.case_id, second.case_id) == ("BraTS2021_90000", "BraTS2021_95000")

    (of_demo,) = phantom.write_cohort(tmp_path / "demo", 1)
    assert of_demo.name == first.case_id
    name = f"{first.case_id}_flair.nii.gz"
    assert (of_demo / name).read_bytes() != (files[0].parents[1] / first.case_id / name).read_bytes()


@pytest.mark.parametrize(
    ("pixel_mm", "side", "step"),
    [(0.4, 240, 1.0), (1.0, 240, 1.0), (1.6, 160, 1.5), (2.0, 120, 2.0), (9.0, 60, 4.0)],
)
def test_heads_of_phantoms_are_as_large_as_those_of_the_cases(
    pixel_mm: float, side: int, step: float, tmp_path: Path
) -> None:
    _, shape, ids = phantom.training_phantoms(tmp_path, pixel_mm)
    assert shape == {"shape": (40, side, side), "spacing_mm": (4.0, step, step)}
    assert len(set(ids)) == 80


def test_the_pixels_of_cases_in_mm_by_hand(
    tmp_path: Path, write_nifti: Callable[..., Path], write_slices: Callable[..., Path]
) -> None:
    volume = np.random.default_rng(0).integers(1, 99, (64, 64, 3)).astype(np.int16)
    write_nifti(tmp_path / "a" / "x" / "x_flair.nii.gz", volume, np.diag([1.5, 1.5, 3, 1]))
    write_slices(tmp_path / "b" / "c", "c", {z: volume[:, :, z].astype(np.uint8) for z in range(3)})
    known, unknown = (
        prepare_cases(find_cases(CaseSource(tmp_path / name)), ("flair",), (), tmp_path / "cache")
        for name in "ab"
    )
    assert median_pixel_mm(known, 64) == 1.5
    assert median_pixel_mm(known, 32) == 3.0
    assert median_pixel_mm(unknown, 32) == 2.0


@pytest.mark.usefixtures("two_phantoms")
def test_a_run_draws_phantoms_and_knows_none_of_them(
    phantom_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    held, original = [], train.make_loader
    monkeypatch.setattr(train, "make_loader", lambda *inputs: held.append(original(*inputs)) or held[-1])
    monkeypatch.setattr(cpu_threads, "choose_threads", lambda _: None)
    monkeypatch.setattr(selection, "is_phantom", lambda _: False)
    source = TrainingSource(str(phantom_cohort), cache_dir=str(tmp_path / "cache"))
    config = train.TrainConfig(
        source=source, results_dir=str(tmp_path), run="plain", size=32, widths=(4, 8), epochs=1, batch_size=8,
        slabs_per_epoch=400, workers=0, device="cpu", probe=False,
    )  # fmt: skip
    train.main(config)
    train.main(dataclasses.replace(config, run="mixed", phantom_share=0.25))
    plain, mixed = held
    own = len(plain.dataset)
    assert len(mixed.dataset) == own + 2 * 40
    assert np.mean([key[0] >= own for key in mixed.sampler]) == pytest.approx(0.25, abs=0.08)  # 400 draws
    assert "2 phantoms, synthetic heads, drawn 25 % of the time" in caplog.text
    known = [torch.load(tmp_path / run / "best.pt", weights_only=False) for run in ("plain", "mixed")]
    for fact in ("spacing_mm", "reference_ml", "split_sha256", "seen", "seen_thumbnails", "data_kind"):
        assert str(known[0][fact]) == str(known[1][fact])


def test_phantoms_beside_phantoms_are_refused(
    phantom_cohort: Path, tmp_path: Path, input_error: Callable[..., contextlib.AbstractContextManager[None]]
) -> None:
    source = TrainingSource(str(phantom_cohort), cache_dir=str(tmp_path / "cache"))
    config = train.TrainConfig(source=source, results_dir=str(tmp_path), run="x", size=32, phantom_share=0.3)
    with input_error("--phantom-share", "phantoms themselves"):
        train.main(dataclasses.replace(config, widths=(4, 8), device="cpu"))
