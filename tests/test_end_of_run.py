"""How a run ends: which epoch's network is kept as best.pt, and at which learning rate."""

import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import train_drunet_v2
from cohort.selection import TrainingSource
from runtime.checkpoints import load_checkpoint
from runtime.log import log
from runtime.state import TrainState
from tests.test_nothing_lost import train
from training.settings import TrainConfig
from utils_v2 import THRESHOLDS

VALIDATION_DICE = [0.2, 0.8, 0.5, 0.4]  # of the epochs, in place of what the networks reach


@pytest.mark.parametrize(
    ("keep", "kept", "epochs"),
    [("best", 2, [1, 2, 3]), ("last", 4, [1, 2, 3, 4])],  # one stops early, the other goes to its end
)
def test_the_epoch_asked_for_is_kept(
    keep: str,
    kept: int,
    epochs: list[int],
    phantom_cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = iter(VALIDATION_DICE)
    monkeypatch.setattr(
        train_drunet_v2, "validate", lambda *_: np.full((1, 1, len(THRESHOLDS)), next(scores))
    )
    monkeypatch.chdir(tmp_path)
    log.setLevel(logging.INFO)
    train(run="made", source=TrainingSource(str(phantom_cohort)), epochs=4, early_stop=1, keep=keep)
    best = load_checkpoint(Path("results/made/best.pt"))
    assert best["epoch"] == kept
    assert best["validation_dice"] == VALIDATION_DICE[kept - 1]
    assert pd.read_csv("results/made/log.csv")["epoch"].tolist() == epochs
    assert f"kept epoch {kept}: validation Dice {VALIDATION_DICE[kept - 1]:.4f}" in caplog.text
    assert ("epoch 2 had 0.8000" in caplog.text) == (keep == "last")  # a run that fell off says so


def test_a_run_of_one_epoch_ends_at_the_lowest_rate_too(
    phantom_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, update = [], train_drunet_v2.update_weights

    def note(config: TrainConfig, state: TrainState, warmup_steps: int) -> bool:
        moved = update(config, state, warmup_steps)
        rates.append(state.optimizer.param_groups[0]["lr"])
        return moved

    monkeypatch.setattr(train_drunet_v2, "update_weights", note)
    monkeypatch.chdir(tmp_path)
    source = TrainingSource(str(phantom_cohort))
    limits = {"warmup_steps": 2, "min_learning_rate": 1e-4, "drop_by": 1.0}
    train(run="made", source=source, epochs=1, slabs_per_epoch=64, schedule="cosine", **limits)
    assert len(rates) == 8
    assert rates[:2] == pytest.approx([0.005, 0.01])  # warm-up
    cosine = [1e-4 + 0.0099 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(2, 8)]
    assert rates[2:] == pytest.approx(cosine)
