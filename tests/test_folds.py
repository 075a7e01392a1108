"""Runs of folds and ensembles: what is trained, who is tested by whom, and the mean of several networks."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from audit.compare import list_seen
from audit.folds import join_rows
from audit.inputs import read_case
from audit.postprocess import join_settings, postprocess, settings_of, threshold_regions
from cohort.cases import load_case
from cohort.ensemble import Members, check_members, join_checkpoints
from cohort.folds import (
    begin_fold,
    check_alike,
    check_splits,
    draw_fold,
    is_run_of_folds,
    list_checkpoints,
    plan_runs,
)
from cohort.layouts import CaseSource, find_cases
from inference_v2 import (
    InferenceConfig,
    TrainedModel,
    load_model,
    load_models,
    predict_case,
    predict_views,
    predict_volume,
    predict_with_spread,
)
from runtime.checkpoints import load_checkpoint, newest_run, save_checkpoint
from runtime.claims import ClaimedError
from runtime.command import parse, to_plain
from train_drunet_v2 import choose_settings
from training.resume import share_batch
from training.settings import TrainConfig
from training.start import place_run

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# The mean of several networks
# ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Logits from the middle slice: a factor, a term, and a ramp from left to right that TTA mirrors."""

    def __init__(self, factor: float, term: float) -> None:
        super().__init__()
        self.factor, self.term = factor, term

    def forward(self, slab: Tensor) -> Tensor:
        """Return (N, 1, S, S)."""
        return self.factor * slab[:, 1:2] + self.term + torch.linspace(-1, 1, slab.shape[-1])


NETWORKS = (Scaled(1, 0), Scaled(-2, 1), Scaled(0.5, -9))


def model_of(*networks: nn.Module) -> TrainedModel:
    """Return a network, or several as one."""
    whole = networks[0] if len(networks) == 1 else Members(networks)
    checkpoint = {} if len(networks) == 1 else {"members": ["a"] * len(networks)}
    return TrainedModel(whole, ("flair",), ("WT",), 1, 16, (0.5,), CPU, None, checkpoint)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def probabilities_by_hand(volume: np.ndarray) -> np.ndarray:
    """Return the probabilities (M, V, D, H, W) of each of NETWORKS in each view."""
    ramp = np.linspace(-1, 1, 16)
    return np.stack(
        [
            np.stack([sigmoid(net.factor * volume[0] + net.term + side * ramp) for side in (1, -1, 1)])
            for net in NETWORKS
        ]
    )


def test_an_ensemble_is_the_mean_of_probabilities_and_its_spread_that_of_its_networks() -> None:
    volume = np.random.default_rng(0).uniform(-3, 3, (1, 5, 16, 16)).astype(np.float32)
    by_hand = probabilities_by_hand(volume)
    model = model_of(*NETWORKS)
    plain = predict_volume(model, volume, tta=False)
    np.testing.assert_allclose(plain[0], by_hand[:, 0].mean(0), atol=1e-6)
    tta = predict_volume(model, volume, batch_size=4)
    np.testing.assert_allclose(tta[0], by_hand.mean((0, 1)), atol=1e-6)
    views, spread = np.zeros((0,)), np.zeros((1, 5, 16, 16), np.float32)
    views = predict_views(model, volume, spread=spread)
    np.testing.assert_allclose(views[:, 0], by_hand.mean(0), atol=1e-6)
    np.testing.assert_allclose(spread[0], by_hand.mean(1).std(0), atol=1e-6)
    mean, same = predict_with_spread(model, volume, batch_size=4)
    assert (mean == tta).all()  # to the bit, so that masks do not depend on --probabilities
    np.testing.assert_array_equal(same, spread)
    _, of_plain = predict_with_spread(model, volume, tta=False)
    np.testing.assert_allclose(of_plain[0], by_hand[:, 0].std(0), atol=1e-6)
    # of one network the spread stays that of its views
    _, alone = predict_with_spread(model_of(NETWORKS[1]), volume)
    np.testing.assert_allclose(alone[0], by_hand[1].std(0), atol=1e-6)


def checkpoint_of(number: int, **changes: object) -> dict:
    """Return what a checkpoint says of its network, but for the weights."""
    config = {"modalities": ("flair",), "regions": ("WT", "TC"), "context": 1, "size": 16}
    return {
        "config": config | {name: changes.pop(name) for name in list(changes) if name in config},
        "weights_sha256": f"{number}",
        "data_kind": "real",
        "thresholds": [0.1 * number, 0.5],
        "reference_ml": {"WT": [number, 10 * number]},
        "spacing_mm": {axis: {"median": 1.0, "low": number, "high": 9.0} for axis in ("in_plane", "slices")},
        "seen": [[case, case, f"image {case}", "", []] for case in (f"P{number}", "P9")],
        "split_sha256": f"split {number}",
    } | changes


def test_an_ensemble_says_what_its_members_say_together() -> None:
    members = [checkpoint_of(number) for number in (1, 2, 6)]
    joined = join_checkpoints([Path("a"), Path("b"), Path("c")], members)
    assert joined["thresholds"] == pytest.approx([0.3, 0.5])
    assert joined["reference_ml"] == {"WT": [1, 60]}
    assert joined["spacing_mm"]["slices"] == {"median": 1.0, "low": 1.0, "high": 9.0}
    assert [entry[0] for entry in joined["seen"]] == ["P1", "P9", "P2", "P6"]  # all that any has seen
    assert joined["data_kind"] == "real"
    assert "split_sha256" not in joined
    snapshots = [checkpoint_of(1), checkpoint_of(2, split_sha256="split 1", data_kind="phantom")]
    del snapshots[1]["thresholds"]  # as in last.pt
    joined = join_checkpoints([Path("a"), Path("b")], snapshots)
    assert joined["thresholds"] == pytest.approx([0.3, 0.5])
    assert (joined["split_sha256"], joined["data_kind"]) == ("split 1", "mixed")


def test_an_ensemble_works_without_a_modality_where_all_members_do() -> None:
    members = [checkpoint_of(1), checkpoint_of(2)]
    members[0]["config"]["modality_dropout"] = 0.3
    assert not join_checkpoints([Path("a"), Path("b")], members)["config"]["modality_dropout"]
    members[1]["config"]["modality_dropout"] = 0.1
    assert join_checkpoints([Path("a"), Path("b")], members)["config"]["modality_dropout"] == 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modalities": ("t2",)}, "modalities"),
        ({"regions": ("TC", "WT")}, "regions"),
        ({"context": 2}, "context"),
        ({"size": 32}, "size"),
        ({"weights_sha256": "1"}, "each network once"),
    ],
)
def test_networks_that_cannot_be_averaged_are_refused(changes, named, input_error) -> None:
    paths = [Path("a.pt"), Path("b.pt")]
    check_members(paths, [checkpoint_of(1), checkpoint_of(2)])
    with input_error("b.pt", "a.pt", named):
        check_members(paths, [checkpoint_of(1), checkpoint_of(2, **changes)])


def test_post_processing_of_an_ensemble_is_the_median_of_that_of_its_members() -> None:
    def setting(component: float, fill: bool) -> dict:
        return {"min_component_mm3": component, "fill_holes": fill, "min_total_mm3": 0.0}

    choices = [{"WT": setting(50.0, True)}, {"WT": setting(10.0, False)}, {"ET": setting(5.0, True)}]
    assert join_settings(choices) == {"WT": setting(10.0, False)}  # of 50, 10, none; ET: of none, none, 5
    assert join_settings([{"WT": setting(50.0, True)}, {}]) == {}
    assert join_settings([{}, {}]) == {}


# ------------------------------------------------------------------------------------------------------------
# What is trained
# ------------------------------------------------------------------------------------------------------------


def plan(text: str) -> tuple[Path | None, list[TrainConfig]]:
    """Return what a command line of training trains."""
    config = choose_settings(lambda defaults=None: parse(TrainConfig, "", defaults, text.split()))
    return plan_runs(config, place_run, share_batch)


def finish(folder: str, config: TrainConfig, **content: object) -> None:
    """Write what a fold has when it is finished, or, with minutes, when it was stopped after these."""
    state = {"model": {}, "config": to_plain(config), "minutes": 0.0, "ranks": 1}
    save_checkpoint(Path(folder) / "last.pt", state | content)
    best = state if content else state | {"postprocessing": None}
    save_checkpoint(Path(folder) / "best.pt", best)


def test_a_run_of_folds_goes_on_with_the_first_that_is_not_finished(tmp_path, monkeypatch, input_error):
    monkeypatch.chdir(tmp_path)
    assert plan("--data-dir x")[0] is None
    run, runs = plan("--data-dir x --run cv --folds 3 --max-minutes 9 --epochs 7 --seed 4")
    assert run == Path("results/cv")
    assert is_run_of_folds(run)
    assert [(each.results_dir, each.run, each.source.fold) for each in runs] == [
        ("results/cv", f"fold_{fold}", fold) for fold in range(3)
    ]
    assert {(each.max_minutes, each.epochs, each.seed, each.resume) for each in runs} == {(9, 7, 4, None)}
    finish("results/cv/fold_0", runs[0])
    stopped = dataclasses.replace(runs[1], batch_size=8, accumulate=2)  # it went on with other ranks
    finish("results/cv/fold_1", stopped, minutes=6.0)
    run, (second, third) = plan("--resume results/cv --workers 0")
    assert (second.resume, second.max_minutes) == ("results/cv/fold_1", 3)  # what is left of the nine
    assert (second.batch_size, second.accumulate, third.batch_size, third.accumulate) == (8, 2, 16, 1)
    assert (third.resume, third.max_minutes, third.source.fold, third.workers) == (None, 9, 2, 0)
    assert [each.run for each in plan("--resume results/cv --fold 2")[1]] == ["fold_2"]
    whole, (alone,) = plan("--resume results/cv/fold_1")  # by its own folder a fold is a run like any other
    assert (whole, alone.results_dir, alone.run, alone.source.fold) == (None, "results/cv", "fold_1", 1)
    same = "--data-dir x --run cv --folds 3 --max-minutes 9 --epochs 7"
    assert [each.run for each in plan(f"{same} --seed 4 --fold 2")[1]] == ["fold_2"]
    with input_error("--seed 5", "results/cv", "4"):
        plan(f"{same} --seed 5 --fold 2")
    with input_error("--run cv", "exists", "--resume"):
        plan(f"{same} --seed 4")
    with input_error("--size 64", "results/cv"):
        plan("--resume results/cv --size 64")
    with input_error("results/cv", "2 of its 3", "fold_1", "--resume results/cv"):
        list_checkpoints("results/cv")


def test_more_epochs_are_for_all_folds(tmp_path, monkeypatch, input_error):
    monkeypatch.chdir(tmp_path)
    _, runs = plan("--data-dir x --run cv --folds 2 --epochs 7")
    for fold, epochs in ((0, 7), (1, 7)):
        finish(f"results/cv/fold_{fold}", runs[fold])
        last = Path(f"results/cv/fold_{fold}/last.pt")
        save_checkpoint(last, load_checkpoint(last) | {"epoch": epochs})
    assert plan("--resume results/cv")[1] == []
    longer = plan("--resume results/cv --epochs 9")[1]
    assert [(each.run, each.epochs, each.resume) for each in longer] == [
        (f"fold_{fold}", 9, f"results/cv/fold_{fold}") for fold in (0, 1)
    ]
    assert json.loads(Path("results/cv/config.json").read_text())["epochs"] == 9
    assert [each.epochs for each in plan("--resume results/cv")[1]] == [9, 9]  # as was asked last
    with input_error("--epochs 6", "fold_0", "7"):
        plan("--resume results/cv --epochs 6")
    with input_error("--max-minutes 5", "results/cv"):
        plan("--resume results/cv --max-minutes 5")


def test_a_fold_that_another_program_has_or_had_is_passed_over(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "drunet")
    _, runs = plan("--data-dir x --run cv --folds 3")
    assert begin_fold(runs[0]) == runs[0]
    finish("results/cv/fold_1", runs[1])
    assert begin_fold(runs[1]) is None
    assert "fold_1 is passed over: it has been finished meanwhile" in caplog.text
    finish("results/cv/fold_2", runs[2], minutes=1.0)  # begun, and stopped
    assert begin_fold(runs[2]).resume == "results/cv/fold_2"

    def is_taken(folder: Path, remedy: str) -> None:
        raise ClaimedError(folder, "another program works in it", remedy)

    monkeypatch.setattr("cohort.folds.claim_folder", is_taken)
    assert begin_fold(runs[0]) is None
    assert "fold_0 is passed over: another program works in it" in caplog.text


def test_two_folds_that_start_at_once_are_one_run(tmp_path, monkeypatch, input_error):
    monkeypatch.chdir(tmp_path)
    text = "--data-dir x --run cv --folds 2 --fold"

    def is_taken(_: TrainConfig) -> TrainConfig:
        plan(f"{text} 0")  # the other program, which has the folder and writes its settings
        raise ClaimedError(Path("results/cv"), "another program works in it", "")

    config = choose_settings(lambda defaults=None: parse(TrainConfig, "", defaults, f"{text} 1".split()))
    _, (fold,) = plan_runs(config, is_taken, share_batch)
    assert (fold.results_dir, fold.run) == ("results/cv", "fold_1")
    monkeypatch.setattr("cohort.folds.LONGEST_WAIT_S", 600)  # for a claim alone, not for a wrong command line
    with input_error("--modality-dropout"):
        plan("--data-dir x --run other --folds 2 --fold 0 --modality-dropout 0.5")


def test_a_run_of_folds_of_which_nothing_was_drawn_can_be_started_again(tmp_path, monkeypatch, input_error):
    monkeypatch.chdir(tmp_path)
    plan("--data-dir typo --run cv --folds 50")
    _, runs = plan("--data-dir x --run cv --folds 2 --fold 1")
    assert runs[0].source.folds == 2
    assert json.loads(Path("results/cv/config.json").read_text())["data_dir"] == "x"
    Path("results/cv/folds.json").write_text('{"folds": []}')
    with input_error("--run cv", "exists"):
        plan("--data-dir x --run cv --folds 2")
    with input_error("folds.json", "2 folds"):
        draw_fold(Path("results/cv"), [], 2, 1, 0)


def test_folds_know_the_cases_they_were_drawn_from(tmp_path, make_cases, input_error):
    cases = make_cases([(f"c{number}", f"c{number}") for number in range(6)])
    split = draw_fold(tmp_path, cases, 3, 0, 0)
    assert draw_fold(tmp_path, cases, 3, 0, 0) == split
    assert draw_fold(tmp_path, cases[1:], 3, 0, 0) == split  # a case that is gone is missed where it is read
    more = make_cases([("new", "new")])
    with input_error("folds.json", "1 of the cases", "new"):
        draw_fold(tmp_path, [*cases, *more], 3, 0, 0)


def test_folds_of_other_settings_or_splits_are_no_cross_validation(tmp_path, monkeypatch, input_error):
    monkeypatch.chdir(tmp_path)
    _, runs = plan("--data-dir x --run cv --folds 2")
    configs = [to_plain(each) for each in runs]
    check_alike(Path("results/cv"), configs)
    check_alike(Path("results/cv"), [configs[0], configs[1] | {"epochs": 3, "workers": 7}])
    with input_error("fold_1", "--ema 0.5", "--resume results/cv"):
        check_alike(Path("results/cv"), [configs[0], configs[1] | {"ema": 0.5}])
    own = [{"sha256": str(fold)} for fold in (0, 1)]
    Path("results/cv/folds.json").write_text(json.dumps({"folds": own}))
    check_splits(Path("results/cv"), {1: own[1]})
    with input_error("fold_1", "another split", "--resume results/cv"):
        check_splits(Path("results/cv"), {1: own[0]})


def test_settings_of_a_fold_make_a_new_run_beside_the_old_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, runs = plan("--data-dir x --run cv --folds 3 --size 48 --widths 4 8")
    Path("results/cv/fold_1").mkdir()
    Path("results/cv/fold_1/config.json").write_text(json.dumps(to_plain(runs[1])))
    _, again = plan("--config results/cv/config.json --run two")
    assert [each.source.fold for each in again] == [0, 1, 2]
    run, (fold,) = plan("--config results/cv/fold_1/config.json --run three")
    assert (run, fold.source.fold, fold.size) == (Path("results/three"), 1, 48)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--fold 0", "--folds is not given"),
        ("--folds 3 --fold 3", "--fold 3"),
        ("--folds 3 --split s.json", "--split"),
        ("--folds 1", "--folds 1"),
        ("--folds 3 --fold -1", "--fold -1"),
    ],
)
def test_flags_about_folds_that_contradict_one_another(flags, named, tmp_path, monkeypatch, input_error):
    monkeypatch.chdir(tmp_path)
    with input_error(named):
        plan(f"--data-dir x {flags}")


def test_a_fold_without_post_processing_has_its_masks_as_those_before_it() -> None:
    def row(case: str, mode: str) -> dict:
        return {"case": case, "mode": mode, "dice": 0.5, "uncertainty": 0.1}

    with_raw = pd.DataFrame([row("a", mode) for mode in ("plain", "plain_raw", "tta", "tta_raw")])
    without = pd.DataFrame([row("b", mode) for mode in ("plain", "tta")])
    joined = join_rows([with_raw, without])
    assert joined.groupby("mode")["case"].apply(list).to_dict() == {
        mode: ["a", "b"] for mode in ("plain", "plain_raw", "tta", "tta_raw")
    }
    assert len(join_rows([without, without])) == 4


# ------------------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------------------

TINY = "--size 48 --widths 4 8 16 --batch-size 8 --slabs-per-epoch 64 --workers 0 --learning-rate 1e-2"
TINY = [*TINY.split(), "--device", "cpu", "--no-probe", "--folds", "3", "--epochs", "1"]


def run(script: str, *arguments: object, cwd: Path) -> str:
    """Run a command in `cwd` and return what it said."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantom_cohort, external_cohort) -> Path:
    """Folder with a run of three folds of six patients, fold 1 trained first and alone, and its audit."""
    folder = tmp_path_factory.mktemp("folds")
    cases = sorted(path for path in phantom_cohort.iterdir() if path.is_dir())[:6]
    for case in cases:
        shutil.copytree(case, folder / "data" / case.name)
    run("train_drunet_v2.py", "--data-dir", "data", "--run", "cv", "--fold", 1, *TINY, cwd=folder)
    (folder / "first_alone").touch()
    run("train_drunet_v2.py", "--resume", "results/cv", cwd=folder)
    said = run("final_evaluation_v2.py", "--external-dir", external_cohort, "--device", "cpu", cwd=folder)
    (folder / "said.txt").write_text(said)
    return folder


def test_folds_are_complete_runs_and_finished_ones_are_kept(trained):
    results = trained / "results" / "cv"
    folders = [results / f"fold_{fold}" for fold in range(3)]
    for folder in folders:
        names = {"config.json", "split.json", "log.csv", "batch.png", "curves.png", "best.pt", "last.pt"}
        names |= {"train.log", "balance.csv", "index.html", "MODEL_CARD.md", ".drunet_written"}
        assert {path.name for path in folder.iterdir()} == names
        log = (folder / "train.log").read_text()
        assert log.count("kept epoch") == 1  # each fold has a log of its own
        assert f"cv/{folder.name}: synthetic phantoms" in log
    trained_at = [(folder / "best.pt").stat().st_mtime for folder in folders]
    assert trained_at[1] < (trained / "first_alone").stat().st_mtime < trained_at[0] < trained_at[2]
    splits = [json.loads((folder / "split.json").read_text()) for folder in folders]
    assert splits == json.loads((results / "folds.json").read_text())["folds"]
    assert newest_run(trained / "results") == results


def test_a_fold_trained_after_others_is_the_one_trained_alone(trained, tmp_path):
    run("train_drunet_v2.py", "--data-dir", trained / "data", "--run", "x", "--fold", 2, *TINY, cwd=tmp_path)
    alone, after = (
        load_checkpoint(folder / "fold_2" / "best.pt")
        for folder in (tmp_path / "results" / "x", trained / "results" / "cv")
    )
    assert alone["weights_sha256"] == after["weights_sha256"]


def predict_masks(model: TrainedModel, case: object, tta: bool) -> np.ndarray:
    """Return the masks (R, D, H, W) of a case by the functions of inference, one network at a time."""
    read = read_case(case, model.modalities)
    probabilities = predict_volume(model, read.volume, read.brain_voxels, tta, frame=read.frame)
    masks = threshold_regions(probabilities, model.thresholds, model.regions)
    return postprocess(masks, model.regions, read.spacing_mm, settings_of(model.checkpoint))


def dice_of(mask: np.ndarray, case: object) -> float:
    reference = load_case(case, ("flair",)).labels > 0
    return 2 * (mask & reference).sum() / (mask.sum() + reference.sum())


def test_the_audit_reports_every_patient_once_by_the_fold_that_has_not_seen_it(trained):
    results = trained / "results" / "cv"
    rows = pd.read_csv(results / "evaluation" / "metrics_per_case.csv")
    rows = rows[rows["mode"] == "plain"]
    internal = rows[rows["cohort"] == "internal"]
    cases = {case.case_id: case for case in find_cases(CaseSource(str(trained / "data")), ("flair",))}
    assert sorted(internal["case"]) == sorted(cases)
    for row in internal.itertuples():
        model = load_model(results / f"fold_{int(row.fold)}" / "best.pt", CPU)
        assert row.case not in {entry[0] for entry in model.checkpoint["seen"]}
        assert row.dice == pytest.approx(
            dice_of(predict_masks(model, cases[row.case], False)[0], cases[row.case])
        )
    validation = rows[rows["cohort"] == "validation"]
    splits = [json.loads((results / f"fold_{fold}" / "split.json").read_text()) for fold in range(3)]
    assert sorted(zip(validation["fold"], validation["case"], strict=True)) == sorted(
        (fold, case) for fold, split in enumerate(splits) for case in split["validation"]
    )


def test_the_summary_of_folds_keeps_its_form_and_says_what_it_is_of(trained):
    folder = trained / "results" / "cv" / "evaluation"
    summary = json.loads((folder / "summary.json").read_text())
    rows = pd.read_csv(folder / "metrics_per_case.csv")
    assert list(summary["cohorts"]) == ["validation", "internal", "external"]
    for mode in ("plain", "tta"):
        part = summary["cohorts"]["internal"]["WT"][mode]
        dice = rows.loc[(rows["cohort"] == "internal") & (rows["mode"] == mode), "dice"]
        assert (part["n_cases"], part["n_patients"]) == (6, 6)
        assert part["dice"]["mean"] == pytest.approx(dice.mean())
    for key in ("threshold", "checkpoint_sha256", "split_sha256", "versions", "hardware", "command"):
        assert summary[key]
    assert summary["seen_in_training"]["internal"] == {"cases": 6, "seen": 0, "unseen": 6}
    assert [fold["n_cases"] for fold in summary["folds"]] == [{"train": 3, "validation": 1, "test": 2}] * 3
    thresholds = [fold["threshold"]["WT"] for fold in summary["folds"]]
    assert summary["threshold"]["WT"] == pytest.approx(np.mean(thresholds))
    said, page = (trained / "said.txt").read_text(), (folder / "report.html").read_text()
    for text in (summary["averaged_over"], said, page):
        assert "out of fold: each internal case once" in text
        assert "validation: each case once per fold" in text
    means = rows[(rows["cohort"] == "internal") & (rows["mode"] == "tta")].groupby("fold")["dice"].mean()
    assert [fold["internal_dice"]["WT"]["tta"] for fold in summary["folds"]] == pytest.approx(list(means))


def test_an_external_cohort_and_inference_get_the_mean_of_the_folds(trained, external_cohort):
    results = trained / "results" / "cv"
    models = [load_model(results / f"fold_{fold}" / "best.pt", CPU) for fold in range(3)]
    case = find_cases(CaseSource(str(external_cohort)), ("flair",))[0]
    read = read_case(case, ("flair",))
    by_fold = np.stack(
        [predict_volume(model, read.volume, read.brain_voxels, frame=read.frame) for model in models]
    )
    settings = ("--checkpoint", "results/cv", "--device", "cpu", "--probabilities", "--output", "masks")
    run("inference_v2.py", *settings, "--input", external_cohort / case.case_id, cwd=trained)
    for kind, expected in (("probability", by_fold.mean(0)), ("spread", by_fold.std(0))):
        written = nib.load(trained / "masks" / f"{case.case_id}_WT_{kind}.nii.gz").get_fdata()
        np.testing.assert_allclose(written.transpose(2, 1, 0), expected[0], atol=1e-5)
    assert by_fold.std(0).max() > 0.001  # the folds do not agree
    mask = np.asarray(nib.load(trained / "masks" / f"{case.case_id}_seg.nii.gz").dataobj) > 0
    rows = pd.read_csv(results / "evaluation" / "metrics_per_case.csv")
    (row,) = rows[(rows["case"] == case.case_id) & (rows["mode"] == "tta")].itertuples()
    mask = mask.transpose(2, 1, 0)
    assert row.dice == pytest.approx(dice_of(mask, case))
    voxels = mask if mask.any() else None
    if voxels is not None:
        assert row.uncertainty == pytest.approx(by_fold.std(0)[0][voxels].mean(), abs=1e-5)
    whole = load_models([results], CPU)
    config = InferenceConfig(checkpoint=("results/cv",))
    alike = [predict_case(dataclasses.replace(config, probabilities=on), whole, read) for on in (False, True)]
    assert (alike[0].masks == alike[1].masks).all()
    assert (alike[0].masks[0] == mask).all()


def test_an_ensemble_has_seen_the_cases_of_all_its_folds(trained):
    whole = load_models([trained / "results" / "cv"], CPU)
    cases = {path.name for path in (trained / "data").iterdir()}
    assert {entry[0] for entry in whole.checkpoint["seen"]} == cases
    assert list_seen(trained / "results" / "cv") == {"case": set(), "patient": set()}  # all out of fold
    command = [sys.executable, str(ROOT / "final_evaluation_v2.py"), "--run", "results/cv", "--device", "cpu"]
    command += ["--external-dir", "data", "--output", "again"]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--external-dir: each of its 6 cases was seen in training or validation" in done.stderr
    command = [sys.executable, str(ROOT / "inference_v2.py"), "--checkpoint", "results/cv", "--device", "cpu"]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no test cases in common" in done.stderr
