"""Which epoch's network a run keeps as best.pt: that of the highest validation Dice, or the last."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import train_drunet_v2
from cohort.selection import TrainingSource
from runtime.checkpoints import load_checkpoint
from runtime.log import log
from tests.test_nothing_lost import train
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
