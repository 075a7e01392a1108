"""A new run from the weights of an old one, and new learning rates for a finished one."""

import dataclasses
import itertools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cohort.initial import InitialWeights, find_facts, read_initial, refuse_seen, start_from
from cohort.layouts import CaseSource, scan_cases
from cohort.leakage import Identity, identity_of_ids, pack_identities, unpack_identities
from cohort.selection import TrainingSource
from cohort.split import split_cases
from model_drunet_v2 import build_network
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.command import parse, to_plain
from runtime.state import Recipe, start_state
from tests.test_commands import TINY, complaint, run
from train_drunet_v2 import choose_settings
from training.settings import TrainConfig
from training.start import make_state

CPU = torch.device("cpu")


def settings_for(**changes: Any) -> dict[str, Any]:
    settings = {"modalities": ("flair", "t1ce"), "context": 1, "regions": ("WT", "TC"), "widths": (4, 8)}
    return settings | {"size": 16} | changes


def initial_of(path: Path = Path("best.pt"), **changes: Any) -> InitialWeights:
    """Return weights of an untrained network, its norms and head moved off their start."""
    torch.manual_seed(0)
    network = build_network(settings_for(**changes))
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.1)
    content = {"model": network.state_dict(), "config": settings_for(**changes), "data_kind": "real"}
    save_checkpoint(path, content | pack_identities([identity_of_ids("old", "old")]))
    return InitialWeights(path, load_checkpoint(path))


def logits(weights: dict[str, torch.Tensor], settings: dict[str, Any], slab: torch.Tensor) -> torch.Tensor:
    network = build_network(settings)
    network.load_state_dict(weights)
    with torch.inference_mode():
        return network.eval()(slab)


def started(initial: InitialWeights, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    network = build_network(settings)
    start_from(network, settings, initial)
    return network.state_dict()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_same_network_starts_with_the_same_weights() -> None:
    initial = initial_of()
    for name, value in started(initial, settings_for()).items():
        assert torch.equal(value, initial.checkpoint["model"][name]), name


def test_new_channels_change_nothing_at_first_and_old_ones_keep_their_place() -> None:
    initial = initial_of()
    before = settings_for()
    # another order, one modality more, one slice more on each side: (C, K, H, W) by hand
    after = settings_for(modalities=("t1ce", "t2", "flair"), context=2)
    wide = torch.randn(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(2))
    narrow = wide[:, [2, 0], 1:4].reshape(2, 6, 16, 16)
    expected = logits(initial.checkpoint["model"], before, narrow)
    found = logits(started(initial, after), after, wide.reshape(2, 15, 16, 16))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_channels_left_out_are_as_if_they_were_zero() -> None:
    initial = initial_of()
    after = settings_for(modalities=("t1ce",), context=0)
    slab = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    whole = torch.zeros(2, 6, 16, 16)
    whole[:, 4] = slab[:, 0]  # the middle slice of the second modality
    expected = logits(initial.checkpoint["model"], settings_for(), whole)
    torch.testing.assert_close(logits(started(initial, after), after, slab), expected, rtol=1e-5, atol=1e-5)


def test_regions_are_taken_by_name_and_new_ones_start_untrained() -> None:
    initial = initial_of()
    weights = started(initial, settings_for(regions=("ET", "TC")))
    assert torch.equal(weights["head.weight"][1], initial.checkpoint["model"]["head.weight"][1])
    assert torch.equal(weights["head.bias"][1], initial.checkpoint["model"]["head.bias"][1])
    assert weights["head.bias"][0] == pytest.approx(-2.94)  # the start of `reset_parameters`


def test_another_network_is_refused_in_one_sentence(input_error: Callable) -> None:
    initial = initial_of()
    for changes, culprit in (
        ({"widths": (4, 16)}, "widths"),
        ({"widths": (4, 8, 16)}, "widths"),
        ({"use_se": False}, "use_se"),
        ({"modalities": ("t1",)}, "no input channel is the same"),
    ):
        with input_error("--init best.pt", culprit):
            started(initial, settings_for(**changes))
    # as many channels as filters: the first block has no convolution in its shortcut
    with input_error("--init best.pt", "do not fit"):
        started(initial_of(modalities=("flair", "t1"), context=0, widths=(2, 8)), settings_for(widths=(2, 8)))


def test_a_checkpoint_that_says_nothing_of_itself_is_refused(input_error: Callable) -> None:
    save_checkpoint(Path("bare.pt"), {"model": {}})
    with input_error("--init bare.pt"):
        read_initial("bare.pt")


def test_averaged_weights_start_there_too() -> None:
    initial = initial_of()
    config = TrainConfig(
        source=TrainingSource(modalities=("flair", "t1ce"), regions=("WT", "TC")),
        widths=(4, 8),
        size=16,
        ema=0.9,
        se_form="slab",  # as the checkpoint, whose settings do not say it
    )
    state = make_state(config, CPU, None, initial)
    for name, value in state.evaluated.state_dict().items():
        assert torch.equal(value, initial.checkpoint["model"][name]), name


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


def choose(text: str) -> TrainConfig:
    return choose_settings(lambda defaults=None: parse(TrainConfig, "", defaults, shlex.split(text)))


def test_the_network_of_the_weights_is_the_default() -> None:
    initial_of(Path("w.pt"), use_attention=False)
    settings = choose("--data-dir d --init w.pt --regions WT")
    source = TrainingSource("d", modalities=("flair", "t1ce"), regions=("WT",))
    expected = TrainConfig(init="w.pt", source=source, widths=(4, 8), size=16, use_attention=False)
    expected = dataclasses.replace(expected, se_form="slab")  # as runs had whose settings do not say it
    assert settings == expected
    make_state(settings, CPU, None, read_initial("w.pt"))  # which refuses weights of another network


@pytest.fixture
def finished() -> TrainConfig:
    """The settings of a run in results/old that has finished its 7 epochs."""
    settings = TrainConfig(run="old", source=TrainingSource("d"), epochs=7, learning_rate=1e-3)
    content = {"model": {}, "config": to_plain(settings), "epoch": 7, "best_epoch": 6}
    save_checkpoint(Path("results/old/last.pt"), content)
    return settings


def test_a_finished_run_with_more_epochs_takes_new_rates(
    finished: TrainConfig, input_error: Callable
) -> None:
    expected = dataclasses.replace(finished, resume="results/old", epochs=9)
    assert choose("--resume results/old --epochs 9") == expected
    for flags, changes in (
        ("--learning-rate 5e-4", {"learning_rate": 5e-4}),
        ("--min-learning-rate 1e-6", {"min_learning_rate": 1e-6}),
        ("--learning-rate 1e-3", {}),  # the rate before its drop
    ):
        changed = dataclasses.replace(expected, rate_since=7, **changes)
        assert choose(f"--resume results/old --epochs 9 {flags}") == changed
    for epochs in ("", "--epochs 7"):
        with input_error("--learning-rate 0.0005", "results/old", "leave the flag out"):
            choose(f"--resume results/old --learning-rate 5e-4 {epochs}")


@pytest.mark.usefixtures("finished")
def test_an_unfinished_run_keeps_its_rates(input_error: Callable) -> None:
    content = load_checkpoint(Path("results/old/last.pt"))
    save_checkpoint(Path("results/old/last.pt"), content | {"epoch": 6})
    for flag in ("--learning-rate", "--min-learning-rate"):
        with input_error(flag, "finished 6 of 9 epochs"):
            choose(f"--resume results/old --epochs 9 {flag} 5e-4")
    assert choose("--resume results/old --epochs 9 --learning-rate 1e-3").rate_since == 0
    # a run that stopped early is finished
    save_checkpoint(Path("results/old/last.pt"), content | {"epoch": 6, "best_epoch": 6 - 15})
    assert choose("--resume results/old --epochs 9 --learning-rate 5e-4").rate_since == 6


def test_a_new_rate_holds_whatever_the_scheduler_did_before() -> None:
    state = start_state(torch.nn.Linear(2, 1), Recipe(1e-3, 1e-5, 0, 0.0, 0.0, None))
    for _ in range(4):
        state.scheduler.step(0.5)
    assert state.optimizer.param_groups[0]["lr"] < 1e-3
    state.restart_rate(2e-3, 1e-4)
    assert state.optimizer.param_groups[0]["lr"] == 2e-3
    for _ in range(4):
        state.scheduler.step(0.5)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


# ------------------------------------------------------------------------------------------------------------
# Whose scans the weights have seen
# ------------------------------------------------------------------------------------------------------------


def identity(case_id: str, patient_id: str, image: str) -> Identity:
    return dataclasses.replace(identity_of_ids(case_id, patient_id), image_sha256=image)


def test_a_seen_test_case_is_named_by_id_patient_or_content(input_error: Callable) -> None:
    first, second = "TCGA_CS_4942", "TCGA_DU_8162"  # of a known kind: other sites have no such ids
    seen = [identity(f"{first}_19970222", first, "one"), identity(f"{second}_19961029", second, "two")]
    for tested in (
        identity(f"{first}_19970222", "x", "z"),
        identity("q", second, "z"),
        identity("renamed", "x", "two"),
    ):
        with input_error("--init best.pt", tested.case_id, "test set", "--split"):
            refuse_seen("best.pt", seen, [], [identity("new", "new", "new"), tested])
    assert refuse_seen("best.pt", seen, seen[:1], [identity("new", "new", "new")]) == 1


def test_init_and_resume_from_end_to_end(tmp_path: Path, phantom_cohort: Path, external_cohort: Path) -> None:
    data = ("--data-dir", phantom_cohort, "--epochs", 1, *TINY)
    run("train_drunet_v2.py", *data, "--run", "first", cwd=tmp_path)
    first = load_checkpoint(tmp_path / "results" / "first" / "best.pt")
    init = ("--init", "results/first/best.pt")
    # the same cohort, drawn anew: some of its test cases have been seen
    cases = scan_cases(CaseSource(str(phantom_cohort)))
    seen = {entry[0] for entry in first["seen"]}
    seed = next(seed for seed in itertools.count() if set(split_cases(cases, seed)["test"]) & seen)
    done = run("train_drunet_v2.py", *data, *init, "--seed", seed, "--run", "leaky", cwd=tmp_path, expect=2)
    assert "of the test set" in complaint(done)
    external = ("--data-dir", external_cohort, "--epochs", 1, "--workers", 0, "--device", "cpu")
    few = ("--slabs-per-epoch", 16, "--batch-size", 8, "--run", "second", "--modalities", "flair", "t1")
    run("train_drunet_v2.py", *external, *few, *init, cwd=tmp_path)
    folder = tmp_path / "results" / "second"
    for _ in range(2):
        second = load_checkpoint(folder / "best.pt")
        assert second["config"]["widths"] == (4, 8, 16)
        assert second["init"]["weights_sha256"] == first["weights_sha256"]
        assert (second["init"]["data_kind"], second["init"]["validation_seen"]) == ("phantom", 0)
        known = {one.case_id for one in unpack_identities(second)}
        assert {entry[0] for entry in first["seen"]} < known
        assert len(second["seen"]) == len(first["seen"]) + 2
        # going on keeps them, and a new rate is in force
        run("train_drunet_v2.py", "--resume", folder, "--epochs", 3, "--learning-rate", 3e-3, cwd=tmp_path)
        last = load_checkpoint(folder / "last.pt")
        assert {entry[0] for entry in first["seen"]} < {entry[0] for entry in last["seen"]}
        assert last["config"]["rate_since"] == 1
    rates = np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1, usecols=2)
    assert rates[1] == pytest.approx(3e-3)
    # the audit of the new run finds a case that only the first weights have seen
    arguments = ("--run", folder, "--external-dir", phantom_cohort, "--device", "cpu")
    done = run("final_evaluation_v2.py", *arguments, cwd=tmp_path)
    leaked = (folder / "evaluation" / "leakage.csv").read_text()
    assert all(entry[0] in leaked for entry in first["seen"])


def test_without_init_the_facts_are_those_of_the_own_cases(phantom_cohort: Path) -> None:
    assert phantom_cohort
    facts = find_facts(None, None, None, {"train": [], "validation": [], "test": []})
    assert facts["seen"] == []
    assert "init" not in facts
