"""A run of training as its files and messages show it."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cohort import folds, phantom
from runtime.state import TrainState
from training.settings import TrainConfig


@dataclass(frozen=True)
class Run:
    """A run's fixed facts: settings, folder, device, and what its checkpoints say of the data."""

    config: TrainConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None is float32
    # data_kind, held_out, skipped, split_sha256, spacing_mm, and the identities of the cases seen
    facts: dict[str, Any]
    records: dict[str, bytes] = field(default_factory=dict)  # files that resuming and the audit need

    @property
    def title(self) -> str:
        """The run's name and what its numbers are of."""
        words = {"phantom": phantom.PHANTOM_NOTE, "mixed": "real data and synthetic phantoms"}
        kind = self.facts["data_kind"]
        if kind == "real" and self.config.phantom_share:
            kind = "mixed"
        return f"{folds.name_run(self.folder)}: {words.get(kind, 'real data')}"


def how_to_resume(run: Run) -> str:
    """Return the words that say how to go on with a run."""
    folder = run.folder.parent if folds.is_run_of_folds(run.folder.parent) else run.folder
    return f"go on with: python train_drunet_v2.py --resume {shlex.quote(str(folder))}"


def remedy_of(run: Run, state: TrainState) -> str:
    """Return where a run stands whose numbers are no longer finite, and how to go on from there."""
    if not state.epoch:
        return "take a lower --learning-rate or --no-amp"
    return (
        f"{run.folder} stands at epoch {state.epoch}: start a run from its weights with --init "
        f"{run.folder / 'best.pt'} and a lower --learning-rate or --no-amp"
    )
