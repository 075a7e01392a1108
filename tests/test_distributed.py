"""Training, audit and inference on several ranks give what one process gives."""

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
from test_ranks import said, torchrun

import final_evaluation_v2
from cohort.layouts import CaseSource, find_cases
from cohort.split import split_cases
from dataset_balance_v2 import BalancedSampler
from runtime.checkpoints import load_checkpoint
from runtime.files import write_json
from training.resume import share_batch
from training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "48", "--widths", "4", "8", "16", "--slabs-per-epoch", "52", "--workers", "0"]
TINY += ["--learning-rate", "1e-2", "--warmup-steps", "1", "--device", "cpu", "--no-amp"]


# ------------------------------------------------------------------------------------------------------------
# Shares of an epoch
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "ranks", "batch"), [(64, 2, 8), (71, 2, 8), (79, 3, 4), (5, 4, 1)])
def test_ranks_share_every_batch_of_one_order(draws, ranks, batch):
    weights = np.arange(1, 21) / 210
    whole = BalancedSampler(weights, draws, seed=3)
    shares = [BalancedSampler(weights, draws, 3, rank, ranks) for rank in range(ranks)]
    for epoch in (0, 1):
        for sampler in (whole, *shares):
            sampler.epoch = epoch
        drawn = [list(sampler) for sampler in shares]
        assert {len(keys) for keys in drawn} == {len(shares[0])} == {draws // ranks}
        order = list(whole)
        for start in range(0, len(drawn[0]) - batch + 1, batch):
            together = sorted(key for keys in drawn for key in keys[start : start + batch])
            assert together == sorted(order[start * ranks : (start + batch) * ranks])


@pytest.mark.parametrize(
    ("batch", "accumulate", "before", "now", "expected"),
    [
        (8, 1, 2, 1, (8, 2)),  # the batch in memory stays, so it still fits
        (16, 1, 1, 2, (8, 1)),
        (8, 2, 1, 2, (8, 1)),
        (8, 3, 2, 4, (4, 3)),
        (8, 1, 1, 1, (8, 1)),
    ],
)
def test_other_ranks_move_the_weights_after_as_many_slabs(batch, accumulate, before, now, expected):
    config = share_batch(TrainConfig(batch_size=batch, accumulate=accumulate), before, now)
    assert (config.batch_size, config.accumulate) == expected
    assert config.batch_size * config.accumulate * now == batch * accumulate * before


def test_slabs_that_ranks_cannot_share_are_refused(input_error):
    with input_error("--nproc-per-node", "16 slabs", "results/run"):
        share_batch(TrainConfig(resume="results/run"), 1, 3)


# ------------------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------------------


def run_alone(script, *arguments, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_two_ranks_at_batch_8_train_as_one_at_batch_16_and_resume_alone(tmp_path, phantom_cohort):
    # With batch statistics over both ranks every number is the same but for the order of float32 sums: 1e-7
    # a step, which Adam's division by small gradients lets grow to 1e-5 within these 6 steps.
    settings = ("--data-dir", phantom_cohort, *TINY, "--epochs", 2)
    process = torchrun(
        *(ROOT / "train_drunet_v2.py", *settings, "--batch-size", 8, "--sync-batchnorm", "--run", "two"),
        cwd=tmp_path,
    )
    _, _, stderr = said(process, "train_drunet_v2.py")
    assert process.returncode == 0, stderr
    alone = ("--batch-size", 16, "--run", "one", "--no-probe")
    run_alone("train_drunet_v2.py", *settings, *alone, cwd=tmp_path)
    one, two = (pd.read_csv(tmp_path / "results" / name / "log.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 2
    assert one["train_loss"][1] < one["train_loss"][0]
    np.testing.assert_allclose(two["train_loss"], one["train_loss"], rtol=1e-4)
    np.testing.assert_allclose(two["train_dice"], one["train_dice"], atol=1e-3)
    np.testing.assert_allclose(two["validation_dice_WT"], one["validation_dice_WT"], atol=1e-3)
    log = (tmp_path / "results" / "two" / "train.log").read_text()
    assert log.count("kept epoch") == 1
    assert "2 ranks" in log

    run_alone("train_drunet_v2.py", "--resume", "results/two", "--epochs", 3, cwd=tmp_path)
    last = load_checkpoint(tmp_path / "results" / "two" / "last.pt")
    assert (last["epoch"], last["ranks"]) == (3, 1)
    config = json.loads((tmp_path / "results" / "two" / "config.json").read_text())
    assert (config["batch_size"], config["accumulate"], config["ranks"]) == (8, 2, 1)


# ------------------------------------------------------------------------------------------------------------
# Audit and inference
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory, phantom_cohort):
    """Folder with a run trained for an epoch, of 2 training, 3 validation and 3 test cases."""
    folder = tmp_path_factory.mktemp("shared")
    split = split_cases(find_cases(CaseSource(phantom_cohort), ("flair",)), fractions=(0.25, 0.375, 0.375))
    write_json(folder / "split.json", split)
    settings = ("--data-dir", phantom_cohort, *TINY, "--epochs", 1, "--batch-size", 16, "--no-probe")
    run_alone("train_drunet_v2.py", *settings, "--run", "one", "--split", "split.json", cwd=folder)
    return folder


def spoil_second(cohort, folder):
    """Copy a cohort and cut the FLAIR of its second case, which is rank 1's first; return the file's name."""
    shutil.copytree(cohort, folder)
    path = sorted(folder.glob("*/*_flair.nii.gz"))[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.name


def test_two_ranks_audit_exactly_as_one_process(trained, external_cohort):
    results = trained / "results"
    shutil.copytree(results / "one", results / "two")
    settings = ("--external-dir", external_cohort, "--device", "cpu")
    run_alone("final_evaluation_v2.py", "--run", "results/one", *settings, cwd=trained)
    settings += ("--cache-dir", "cache_of_two")  # empty, so that the first rank decodes too
    process = torchrun(ROOT / "final_evaluation_v2.py", "--run", "results/two", *settings, cwd=trained)
    stdout, _, stderr = said(process, "final_evaluation_v2.py")
    assert process.returncode == 0, stderr
    assert stdout.count("report: ") == 1
    assert stdout.count("3 made now") == 3  # the first rank decodes each cohort

    one, two = (results / name / "evaluation" for name in ("one", "two"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    rows, shared = (pd.read_csv(folder / "metrics_per_case.csv") for folder in (one, two))
    assert rows.groupby("cohort")["case"].nunique().to_dict() == dict.fromkeys(rows["cohort"], 3)
    times = [name for name in rows if name.startswith("seconds")]
    pd.testing.assert_frame_equal(shared.drop(columns=times), rows.drop(columns=times), check_exact=True)
    summary, of_two = (json.loads((folder / "summary.json").read_text()) for folder in (one, two))
    assert summary["calibration"]["WT"]["tta"]["n_voxels"] > 0
    assert (summary.pop("ranks"), of_two.pop("ranks")) == (1, 2)
    for differs in ("command", "settings"):
        del summary[differs], of_two[differs]
    assert of_two == summary

    process = torchrun(
        *(ROOT / "final_evaluation_v2.py", "--compare", "results/one", "results/two"), cwd=trained
    )
    stdout, _, stderr = said(process, "final_evaluation_v2.py")
    assert process.returncode == 0, stderr
    assert stdout.count("comparison.json and comparison.png are in") == 1


def test_bins_are_pooled_in_the_order_of_the_cases_however_they_were_shared(monkeypatch):
    # at 1e16 a float holds no 1: pooled rank by rank, 1e16 - 1e16 first, the sum would be 1
    values = {"a": 1e16, "b": 1.0, "c": -1e16}

    def evaluate(_model, _cohort, case, _batch_size):
        counts = {mode: np.ones((1, 2, 3), np.int64) for mode in final_evaluation_v2.MODES}
        bins = {mode: np.full((1, 2, 3), values[case]) for mode in final_evaluation_v2.MODES}
        return final_evaluation_v2.CaseAudit([{"case": case, "mode": "plain", "dice": 1.0}], counts, bins)

    monkeypatch.setattr(final_evaluation_v2, "evaluate_case", evaluate)
    audit = final_evaluation_v2.evaluate_cohort(None, "validation", list(values), {"b"}, 16)
    assert audit.rows["case"].tolist() == list(values)
    assert audit.rows["seen_in_training"].tolist() == [False, True, False]
    assert (audit.counts["tta"] == 3).all()
    assert (audit.bins["tta"] == 0).all()


def test_a_broken_case_of_one_rank_ends_the_audit_with_one_sentence(trained, external_cohort, tmp_path):
    name = spoil_second(external_cohort, tmp_path / "broken")
    settings = ("--run", trained / "results" / "one", "--output", "audit", "--device", "cpu")
    process = torchrun(
        *(ROOT / "final_evaluation_v2.py", "--external-dir", "broken", *settings), cwd=tmp_path
    )
    _, lines, stderr = said(process, "final_evaluation_v2.py")
    assert process.returncode != 0
    assert len(lines) == 1, stderr
    assert name in lines[0]
    assert f'File "{ROOT / "final_evaluation_v2.py"}"' not in stderr  # no traceback but torchrun's own
    assert not (tmp_path / "audit").exists()


def test_two_ranks_segment_as_one_process(trained, external_cohort, tmp_path):
    cases = sorted(path for path in external_cohort.iterdir() if path.is_dir())[::-1]
    settings = ("--checkpoint", trained / "results" / "one" / "best.pt", "--device", "cpu", "--input", *cases)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_alone("inference_v2.py", *settings, cwd=tmp_path / "one")
    process = torchrun(ROOT / "inference_v2.py", *settings, cwd=tmp_path / "two")
    stdout, _, stderr = said(process, "inference_v2.py")
    assert process.returncode == 0, stderr
    assert stdout.count("masks, overlays and volumes.csv are in") == 1

    one, two = (tmp_path / name / "predictions" for name in ("one", "two"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert (two / "volumes.csv").read_text() == (one / "volumes.csv").read_text()
    assert pd.read_csv(two / "volumes.csv")["case"].tolist() == [case.name for case in cases]
    for case in cases:
        masks = [nib.load(folder / f"{case.name}_seg.nii.gz") for folder in (one, two)]
        assert np.array_equal(*(np.asarray(mask.dataobj) for mask in masks))
        assert np.array_equal(*(mask.affine for mask in masks))


def test_a_rank_without_a_case_waits_for_the_others(trained, external_cohort, tmp_path):
    case = next(path for path in external_cohort.iterdir() if path.is_dir())
    settings = ("--checkpoint", trained / "results" / "one" / "best.pt", "--device", "cpu", "--input", case)
    process = torchrun(ROOT / "inference_v2.py", *settings, cwd=tmp_path)
    _, lines, stderr = said(process, "inference_v2.py")
    assert process.returncode == 0, stderr
    assert not lines
    assert pd.read_csv(tmp_path / "predictions" / "volumes.csv")["case"].tolist() == [case.name]


def test_a_broken_case_of_one_rank_ends_no_batch(trained, external_cohort, tmp_path):
    name = spoil_second(external_cohort, tmp_path / "broken")
    settings = ("--checkpoint", trained / "results" / "one" / "best.pt", "--device", "cpu")
    process = torchrun(ROOT / "inference_v2.py", "--input", "broken", *settings, cwd=tmp_path)
    stdout, lines, stderr = said(process, "inference_v2.py")
    assert process.returncode == 1
    assert not lines, stderr
    assert f'File "{ROOT / "inference_v2.py"}"' not in stderr  # no traceback but torchrun's own
    assert stdout.count("was not segmented") == 1
    table = pd.read_csv(tmp_path / "predictions" / "volumes.csv")
    assert table["error"].notna().tolist() == [False, True, False]
    assert name in table["error"][1]
    assert len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))) == 2
