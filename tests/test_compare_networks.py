"""The ring in which networks are compared: rows, schedules, tables."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import compare_networks
from benchmarks.compare_networks import RingConfig, main, row_path, scheduled_rate
from benchmarks.comparison_tables import (
    group_near,
    plot_cost,
    read_rows,
    show_tables,
    spread_out,
    tabulate,
)
from benchmarks.networks import (
    ENTRIES,
    BCEDice,
    Build,
    DeepSupervision,
    Entry,
    WindowSqueeze,
    build_row,
    ours,
)
from model_drunet_v2 import SqueezeExcitation, compress_bright
from runtime.files import write_json
from utils_v2 import HybridFocalDiceLoss

PEERS = ("MONAI", "nnU-Net", "smp")


def make_row(entry: str, fold: int, dice: dict[str, float], **changes: object) -> dict[str, object]:
    """Return a row of one test case per entry of `dice`; plain is 0.1 below TTA."""
    cases = [
        {"case": case, "patient": case, "region": "WT", "mode": mode, "dice": value - below}
        for case, value in dice.items()
        for mode, below in (("tta", 0.0), ("plain", 0.1))
    ]
    cost = {"slabs": 100, "seconds": 10.0, "parameters": 2_000_000, "gflop": 1.5, "activation_gb": 0.5}
    return {"entry": entry, "fold": fold, "seed": 0, "home": cases, "abroad": cases, **cost, **changes}


# ------------------------------------------------------------------------------------------------------------
# Networks and losses
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ENTRIES if not name.startswith(PEERS)])
def test_each_row_of_ours_maps_slabs_to_logits_and_trains(name: str) -> None:
    entry = ENTRIES[name]
    network = entry.build(2 * entry.context + 1, 2, (4, 8, 16))
    logits = network(torch.randn(2, 2 * entry.context + 1, 32, 32))
    assert logits.shape == (2, 2, 32, 32)
    loss = entry.loss(logits, (torch.rand(2, 2, 32, 32) > 0.8).float())
    loss.backward()
    assert torch.isfinite(loss)


def test_a_window_squeeze_weighs_where_a_slab_squeeze_cannot() -> None:
    squeeze = SqueezeExcitation(4)
    x = torch.zeros(1, 4, 8, 8)
    x[:, :, :4, :4] = 3.0
    with torch.no_grad():
        weight = WindowSqueeze(squeeze)(x)
        constant = WindowSqueeze(squeeze)(torch.full((1, 4, 8, 8), 2.0))
        torch.testing.assert_close(constant, squeeze(torch.full((1, 4, 8, 8), 2.0)).expand(1, 4, 8, 8))
    assert weight.shape == x.shape
    assert weight[0, :, 0, 0].ne(weight[0, :, 7, 7]).any()


def test_deep_supervision_halves_the_weight_from_level_to_level() -> None:
    target = (torch.rand(2, 1, 8, 8) > 0.5).float()
    fine, coarse = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 4, 4)
    one, other = BCEDice()(fine, target), BCEDice()(coarse, target[:, :, 1::2, 1::2])
    torch.testing.assert_close(DeepSupervision()([fine, coarse], target), (one + other / 2) / 1.5)
    torch.testing.assert_close(DeepSupervision()(fine, target), one)


def test_bce_and_dice_is_their_sum() -> None:
    logits, target = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    dice = 1 - (2 * 0.5 + 1) / (2 + 1 + 1)  # probabilities of a half
    expected = torch.tensor(math.log(2) + dice)
    torch.testing.assert_close(BCEDice()(logits, target), expected)
    assert HybridFocalDiceLoss(focal_weight=0)(logits, target) == pytest.approx(dice)


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------


def test_schedules_by_hand() -> None:
    assert scheduled_rate("cosine", 0.5) == pytest.approx(0.01 + 0.99 / 2)
    assert scheduled_rate("cosine", 1.0) == pytest.approx(0.01)
    assert scheduled_rate("cosine", 1.2) == pytest.approx(0.01)  # the last step may go beyond the budget
    assert [scheduled_rate("drop", share) for share in (0.5, 0.74, 0.75, 1.0)] == [1, 1, 0.1, 0.1]
    assert scheduled_rate("constant", 0.9) == 1
    assert 0 < scheduled_rate("constant", 0.0) < scheduled_rate("constant", 0.01) < 1


def test_rows_are_trained_tested_and_not_run_again(
    phantom_cohort: Path, external_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_networks, "RESULTS", tmp_path)
    config = RingConfig(
        entries=("ours, no SE", "ours, SE over the head"),
        data_dir=(str(phantom_cohort),),
        external_dir=(str(external_cohort), str(phantom_cohort)),  # the cases at home are no external ones
        cache_dir=str(tmp_path / "cache"),
        folds=4,
        slabs=48,
        validations=2,
        widths=(4, 8),
        table=True,
        device="cpu",
    )
    main(config)
    paths = [row_path(config, name, 0, 0) for name in config.entries]
    rows = [json.loads(path.read_text()) for path in paths]
    for row in rows:
        assert row["slabs"] == 48
        assert [each["slabs"] for each in row["history"]] == [32, 48]
        assert row["validation_dice"] == max(each["validation_dice"] for each in row["history"])
        assert len({case["patient"] for case in row["home"]}) == 2  # a quarter of eight
        assert len(row["home"]) == 4  # plain and TTA
        assert len({case["case"] for case in row["abroad"]}) == 3
        assert not {case["case"] for case in row["abroad"]} & {case["case"] for case in row["home"]}
    assert {case["case"] for case in rows[0]["home"]} == {case["case"] for case in rows[1]["home"]}
    assert (paths[0].parent / "table_WT.csv").exists()
    assert (paths[0].parent / "cost_WT.png").stat().st_size > 10_000
    stamps = [path.stat().st_mtime_ns for path in paths]
    main(dataclasses.replace(config, table=False))
    assert stamps == [path.stat().st_mtime_ns for path in paths]


def test_a_ring_without_another_cohort_runs(
    phantom_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_networks, "RESULTS", tmp_path)
    main(
        config := RingConfig(
            entries=("ours, no SE",),
            data_dir=(str(phantom_cohort),),
            external_dir=(),
            cache_dir=str(tmp_path / "cache"),
            slabs=16,
            validations=1,
            widths=(4, 8),
            device="cpu",
        )
    )
    row = json.loads(row_path(config, "ours, no SE", 0, 0).read_text())
    assert row["home"]
    assert row["abroad"] == []


def test_an_unknown_row_is_named(input_error: Callable[..., Any]) -> None:
    with input_error("--entries 'theirs'", "MONAI AttentionUnet"):
        main(RingConfig(entries=("theirs",)))
    with input_error("--reference 'theirs'", "MONAI AttentionUnet"):
        main(RingConfig(reference="theirs"))


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------


def test_differences_are_paired_over_the_folds_that_both_have() -> None:
    reference = [
        make_row("ours, no SE", 0, {"a": 0.8, "b": 0.6}),
        make_row("ours, no SE", 1, {"c": 0.1}),
    ]
    other = [make_row("MONAI SegResNet", 0, {"a": 0.7, "b": 0.72}, slabs=50)]
    first, second = tabulate({"ours, no SE": reference, "MONAI SegResNet": other}, "WT", "ours, no SE")
    assert (first["runs"], first["n home"], second["n home"]) == (2, 3, 2)
    assert first["home tta"].startswith("0.500")
    assert first["home plain"].startswith("0.400")
    assert "home minus reference" not in first
    assert second["home minus reference"].startswith("+0.010")  # not 0.71 - 0.5
    assert second["home p"] == 1
    assert (second["slabs/s"], second["M parameters"]) == (5.0, 2.0)


def test_the_difference_of_each_run_stands_beside_the_interval() -> None:
    ours = [make_row("ours, no SE", 0, {"a": 0.5, "b": 0.7}) | {"seed": seed} for seed in (0, 1)]
    theirs = [make_row("MONAI SegResNet", 0, {"a": 0.4, "b": 0.6}) | {"seed": 1}]
    theirs.append(make_row("MONAI SegResNet", 0, {"a": 0.5, "b": 1.0}) | {"seed": 0})
    _, line = tabulate({"ours, no SE": ours, "MONAI SegResNet": theirs}, "WT", "ours, no SE")
    assert line["home, each run"] == "-0.100 +0.150"
    assert line["home minus reference"].startswith("+0.025")
    line, _ = tabulate({"ours, no SE": ours, "MONAI SegResNet": theirs}, "WT", "MONAI SegResNet")
    assert line["home minus reference"].startswith("-0.025")
    _, line = tabulate({"ours, no SE": ours, "MONAI SegResNet": theirs[:1]}, "WT", "ours, no SE")
    assert "home, each run" not in line


def test_a_ring_without_another_cohort_has_a_table_and_a_plot_of_home_alone(tmp_path: Path) -> None:
    rows = {name: [make_row(name, 0, {"a": 0.5}, abroad=[])] for name in ("ours, no SE", "MONAI SegResNet")}
    table = pd.DataFrame(list(tabulate(rows, "WT", "ours, no SE")))
    assert "home tta" in table
    assert not [column for column in table if "abroad" in column]
    plot_cost(tmp_path / "cost.png", table, "WT")
    assert cv2.imread(str(tmp_path / "cost.png")).shape[1] < 130 * 13  # one panel, and the names


def test_runs_without_another_cohort_are_left_out_of_its_columns() -> None:
    ours = [make_row("ours, no SE", 0, {"a": 0.5}), make_row("ours, no SE", 1, {"b": 0.9}, abroad=[])]
    theirs = [
        make_row("MONAI SegResNet", 0, {"a": 0.4}, abroad=[]),
        make_row("MONAI SegResNet", 1, {"b": 0.6}),
    ]
    first, second = tabulate({"ours, no SE": ours, "MONAI SegResNet": theirs}, "WT", "ours, no SE")
    assert (first["n home"], first["n abroad"]) == (2, 1)
    assert second["home minus reference"].startswith("-0.200")
    assert "abroad minus reference" not in second  # no run of both was tested there


def test_a_reference_that_was_not_run_is_named(tmp_path: Path, input_error: Callable[..., Any]) -> None:
    write_json(tmp_path / "x_fold0_seed0.json", make_row("MONAI SegResNet", 0, {"a": 0.4}))
    with input_error("--reference 'ours, no SE'", "MONAI SegResNet"):
        show_tables(tmp_path, tuple(ENTRIES), ("WT",), "ours, no SE", (0,))


def test_seeds_of_one_fold_are_averaged_per_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_networks, "RESULTS", tmp_path)
    config = RingConfig()
    for seed, dice in ((0, 0.4), (1, 0.6)):
        row = make_row("ours, no SE", 0, {"a": dice, "b": 0.9}) | {"seed": seed}
        write_json(row_path(config, "ours, no SE", 0, seed), row)
    (line,) = tabulate(read_rows(compare_networks.folder_of(config), (), (0,)), "WT", "ours, no SE")
    assert line["n home"] == 2  # cases, not runs
    assert float(line["home tta"].split()[0]) == pytest.approx(np.mean([0.5, 0.9]), abs=1e-3)


@pytest.mark.parametrize("build", [ours(use_se=False), lambda *_: nn.Identity()])
def test_all_networks_of_the_ring_see_compressed_slabs_where_the_row_says_so(build: Build) -> None:
    slab = 4 * torch.rand(1, 3, 32, 32)
    for compress in (True, False):
        torch.manual_seed(0)
        network = build_row(Entry(build, compress=compress), 3, 1, (4, 8)).eval()
        torch.manual_seed(0)
        plain = build(3, 1, (4, 8)).eval()
        torch.testing.assert_close(network(slab), plain(compress_bright(slab) if compress else slab))


def test_a_table_is_of_the_folds_named(tmp_path: Path) -> None:
    for fold, case in enumerate(("a", "b")):
        write_json(
            tmp_path / f"ours_fold{fold}_seed0.json", make_row("ours, no SE", fold, {case: 0.5 + fold / 10})
        )
    for folds, home in (((0,), "0.500"), ((1,), "0.600"), ((0, 1), "0.550")):
        show_tables(tmp_path, ("ours, no SE",), ("WT",), "ours, no SE", folds)
        table = pd.read_csv(tmp_path / "table_WT.csv")
        assert table["runs"].tolist() == [len(folds)]
        assert table["home tta"][0].startswith(home)


def test_labels_of_a_plot_by_hand() -> None:
    assert group_near(pd.Series([0.2, 0.0, 0.24, 0.05]), 0.1) == [[1, 3], [0, 2]]
    assert spread_out(np.array([1.0, 1.0, 1.0]), 0.5, 3.0).tolist() == [1.0, 1.5, 2.0]  # upwards
    assert spread_out(np.array([1.0, 2.9, 3.0]), 0.5, 3.0).tolist() == [1.0, 2.5, 3.0]  # down from the top


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.2))
def test_labels_of_a_plot_are_apart_and_below_the_top(heights: list[float], gap: float) -> None:
    spread = spread_out(np.sort(heights), gap, 1.0)
    assert np.all(np.diff(spread) > gap - 1e-9)
    assert spread[-1] <= 1.0
