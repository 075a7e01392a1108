"""Where the settings of a training run come from: command line, demo, another run, the run resumed."""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from cohort.selection import TrainingSource
from runtime.checkpoints import save_checkpoint
from runtime.command import parse, to_plain
from runtime.state import Recipe, start_state
from train_drunet_v2 import choose_settings
from training.schedule import follow_cosine
from training.settings import DEMO, PRESETS, TrainConfig
from training.start import place_run


def choose(text: str) -> TrainConfig:
    """Return the settings for a command line."""
    return choose_settings(lambda defaults=None: parse(TrainConfig, "", defaults, shlex.split(text)))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved() -> TrainConfig:
    """The settings of a run in results/old, written flat, with a setting that is gone since."""
    settings = TrainConfig(
        run="old",
        source=TrainingSource("data/somewhere", slice_channel=2),
        widths=(4, 8),
        size=48,
        epochs=7,
        max_minutes=5.0,
        seed=3,
    )
    plain = {**to_plain(settings), "cache_gb": 50.0}
    save_checkpoint(Path("results/old/last.pt"), {"model": {}, "config": plain})
    Path("results/old/config.json").write_text(json.dumps({**plain, "command": "python train_drunet_v2.py"}))
    return settings


def test_without_data_the_demo_sets_what_was_not_typed() -> None:
    assert choose("") == DEMO
    typed = choose("--size 256 --no-amp")
    assert typed == dataclasses.replace(DEMO, size=256, amp=False)


def test_with_data_nothing_is_the_demos() -> None:
    assert choose("--data-dir x") == TrainConfig(source=TrainingSource("x"))
    Path("data/BraTS2021").mkdir(parents=True)
    assert choose("") == TrainConfig()


@pytest.mark.usefixtures("saved")
def test_a_preset_is_the_default_of_what_was_not_typed(input_error: object) -> None:
    strong = choose("--data-dir x --preset strong")
    assert strong == TrainConfig(source=TrainingSource("x"), preset="strong", **PRESETS["strong"])
    assert not strong.use_se
    assert not strong.use_attention
    assert strong.compress
    assert choose("--data-dir x --preset published") == TrainConfig(source=TrainingSource("x"))
    typed = choose("--data-dir x --preset strong --use-se --ema 0.5")
    assert typed == dataclasses.replace(strong, use_se=True, ema=0.5)
    assert choose("--preset strong") == dataclasses.replace(DEMO, preset="strong", **PRESETS["strong"])
    for preset in ("strong", "published"):
        with input_error(f"--preset {preset}", "--config"):
            choose(f"--config results/old/config.json --preset {preset}")


def test_a_cosine_falls_along_the_share_of_epochs_or_minutes() -> None:
    config = TrainConfig(
        schedule="cosine", epochs=10, drop_by=1.0, learning_rate=1.0, min_learning_rate=0.2, max_minutes=9.0
    )
    state = start_state(nn.Conv2d(1, 1, 1), Recipe(1.0, 0.2, 0, 0.0, 0.0, None))

    def rate(settings: TrainConfig, epoch: int, share_of_epoch: float, used: float) -> float:
        state.epoch = epoch
        follow_cosine(settings, state, SimpleNamespace(fraction_used=lambda: used), share_of_epoch)
        return state.optimizer.param_groups[0]["lr"]

    three_quarters = 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2
    assert rate(config, 0, 0.0, 0.0) == pytest.approx(1.0)
    assert rate(config, 5, 0.0, 0.0) == pytest.approx(0.6)  # half of the epochs
    assert rate(config, 7, 0.5, 0.0) == pytest.approx(three_quarters)
    assert rate(config, 5, 0.0, 0.75) == pytest.approx(three_quarters)  # of the minutes
    assert rate(config, 10, 0.0, 0.1) == pytest.approx(0.2)
    assert rate(dataclasses.replace(config, drop_by=0.5), 5, 0.0, 0.0) == pytest.approx(0.2)
    assert rate(dataclasses.replace(config, rate_since=5), 7, 0.5, 0.0) == pytest.approx(0.6)


def test_another_runs_settings_are_the_defaults_of_a_new_run(saved: TrainConfig) -> None:
    settings = choose("--config results/old/config.json --seed 9 --size 256")
    assert settings == dataclasses.replace(
        saved, run=None, seed=9, size=256, config="results/old/config.json"
    )


def test_a_resumed_run_has_its_own_settings_but_for_how_long_and_where(saved: TrainConfig) -> None:
    settings = choose("--resume results/old --epochs 9 --workers 0 --size 48")
    assert settings == dataclasses.replace(
        saved, resume="results/old", epochs=9, workers=0, max_minutes=None
    )  # a wall-clock limit is one command's
    assert choose("--resume results/old --max-minutes 2").max_minutes == 2


@pytest.mark.parametrize("way", ["--config results/old/config.json", "--resume results/old"])
def test_settings_that_do_not_say_over_what_se_averages_are_of_the_slab(saved: TrainConfig, way: str) -> None:
    assert saved.se_form == "head"
    assert choose(way).se_form == "head"
    plain = to_plain(saved)
    del plain["se_form"]  # as earlier versions wrote it
    save_checkpoint(Path("results/old/last.pt"), {"model": {}, "config": plain})
    Path("results/old/config.json").write_text(json.dumps(plain))
    assert choose(way).se_form == "slab"


@pytest.mark.parametrize(
    "flags", ["--size 64", "--seed 0", "--no-amp", "--data-dir elsewhere", "--no-use-se", "--slice-channel 1"]
)
@pytest.mark.usefixtures("saved")
def test_a_resumed_run_cannot_be_another_one(flags: str, input_error: Callable) -> None:
    flag = flags.split()[0].replace("--no-", "--")
    with input_error(flag, "results/old", "leave the flag out"):
        choose(f"--resume results/old {flags}")


def test_a_run_that_is_not_there_or_half_there_is_named(input_error: Callable) -> None:
    with input_error("results/none"):
        choose("--resume results/none")
    with input_error("--config nowhere.json"):
        choose("--config nowhere.json")
    Path("half.json").write_text('{"seed": 1')
    with input_error("--config half.json"):
        choose("--config half.json")
    Path("list.json").write_text("[1]")
    with input_error("--config list.json"):
        choose("--config list.json")
    Path("wrong.json").write_text('{"epochs": 0}')
    with input_error("--epochs 0"):
        choose("--config wrong.json")


@pytest.mark.usefixtures("saved")
def test_resume_and_config_exclude_each_other(input_error: Callable) -> None:
    with input_error("--config", "--resume"):
        choose("--resume results/old --config results/old/config.json")


@pytest.mark.usefixtures("saved")
def test_a_run_gets_a_name_and_takes_none_that_is_in_use(input_error: Callable) -> None:
    placed = place_run(TrainConfig(source=TrainingSource("data/somewhere")))
    assert placed.run.startswith("somewhere_2")
    assert place_run(dataclasses.replace(placed, run="new")).run == "new"
    with input_error("--run old", "--resume"):
        place_run(dataclasses.replace(placed, run="old"))
