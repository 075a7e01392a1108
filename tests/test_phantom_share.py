"""Phantoms trained on beside the cases: how often they are drawn, and that they stay out of the rest."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import train_drunet_v2 as train
from cohort import phantom
from cohort.selection import TrainingSource, prepare_phantoms
from dataset_balance_v2 import balance_phantoms
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
    folder = tmp_path / "phantoms"
    phantom.write_training_phantoms(folder)
    files = sorted(folder.glob("*/*"))
    assert len(files) == 10
    before = [path.stat().st_mtime_ns for path in files]
    phantom.write_training_phantoms(folder)
    assert before == [path.stat().st_mtime_ns for path in files]
    next(folder.glob("*/*_seg.nii.gz")).unlink()  # as a writer that was killed leaves it
    phantom.write_training_phantoms(folder)
    assert sorted(folder.glob("*/*")) == files

    source = TrainingSource(cache_dir=str(tmp_path), modalities=("t1", "flair"), regions=("WT", "ET"))
    first, second = prepare_phantoms(source)
    assert (first.case_id, second.case_id) == ("BraTS2021_90000", "BraTS2021_95000")
    assert first.volume.shape == (2, 40, 120, 120)

    (of_demo,) = phantom.write_cohort(tmp_path / "demo", 1)
    assert of_demo.name == first.case_id
    name = f"{first.case_id}_flair.nii.gz"
    assert (of_demo / name).read_bytes() != (folder / first.case_id / name).read_bytes()


@pytest.mark.usefixtures("two_phantoms")
def test_a_run_draws_phantoms_and_knows_none_of_them(
    phantom_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    held, original = [], train.make_loader
    monkeypatch.setattr(train, "make_loader", lambda *inputs: held.append(original(*inputs)) or held[-1])
    monkeypatch.setattr(cpu_threads, "choose_threads", lambda _: None)
    source = TrainingSource(str(phantom_cohort), cache_dir=str(tmp_path / "cache"))
    config = train.TrainConfig(
        source=source, results_dir=str(tmp_path), run="plain", size=32, widths=(4, 8), epochs=1, batch_size=8,
        slabs_per_epoch=400, workers=0, device="cpu", probe=False,
    )  # fmt: skip
    train.main(config)
    train.main(dataclasses.replace(config, run="mixed", phantom_share=0.25))
    plain, mixed = held
    own = len(plain.dataset)
    assert len(mixed.dataset) == own + 80
    assert np.mean([key[0] >= own for key in mixed.sampler]) == pytest.approx(0.25, abs=0.08)  # 400 draws
    assert "2 phantoms, synthetic heads, drawn 25 % of the time" in caplog.text
    known = [torch.load(tmp_path / run / "best.pt", weights_only=False) for run in ("plain", "mixed")]
    for fact in ("spacing_mm", "reference_ml", "split_sha256", "seen", "seen_thumbnails", "data_kind"):
        assert str(known[0][fact]) == str(known[1][fact])
