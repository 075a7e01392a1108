"""Several ranks work as one: shares, sums, batch norm, training, audit, inference, and how a run ends.

Ranks are real ones: processes that torchrun starts, on the CPU by gloo.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import final_evaluation_v2
from dataset_balance_v2 import BalancedSampler, split_cases
from layouts_v2 import find_cases
from run_v2 import TrainConfig, share_batch
from utils_v2 import load_checkpoint, write_json

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "48", "--widths", "4", "8", "16", "--slabs-per-epoch", "52", "--workers", "0"]
TINY += ["--learning-rate", "1e-2", "--warmup-steps", "1", "--device", "cpu", "--no-amp"]

# What ranks do in the tests: agree on numbers, or end in one of the ways a run can end.
SCRIPT = """
import os, signal, sys, time
from dataclasses import dataclass
import torch
from torch import nn
from distributed_v2 import *
from utils_v2 import HybridFocalDiceLoss, InputError, option, run_command

@dataclass(frozen=True)
class Config:
    way: str = option("numbers", "what to do")

def numbers():
    assert world_size() == 2 and rank() == int(os.environ["RANK"])
    assert from_main({"clock": rank()}) == {"clock": 0}
    assert list(share_of(range(5))) == [[0, 2, 4], [1, 3]][rank()]
    assert gather_shares(share_of(list("abcde"))) == list("abcde")
    assert sum_counts(torch.tensor([1, rank()])).tolist() == [2, 1]

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))

    torch.manual_seed(1)  # the same slabs on both ranks
    slabs = torch.randn(6, 3, 12, 12) + torch.arange(6.0)[:, None, None, None]
    targets = (torch.rand(6, 2, 8, 8) > torch.linspace(0.1, 0.9, 6)[:, None, None, None]).float()
    whole = make()
    whole_loss = HybridFocalDiceLoss()(whole(slabs), targets)
    whole_loss.backward()
    shared = share_batchnorm(make(), torch.device("cpu"))
    assert list(shared.state_dict()) == list(whole.state_dict())
    network = wrap_network(shared, torch.device("cpu"))
    loss = HybridFocalDiceLoss(pool=sum_over_ranks)(network(share_of(slabs)), share_of(targets))
    loss.backward()
    torch.testing.assert_close(sum_counts(loss) / 2, whole_loss.detach())
    for ours, theirs in zip(shared.parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value)
    before = shared[0].weight.grad.clone()
    with keep_gradients(network, True):
        network(share_of(slabs)).sum().backward()
    added = shared[0].weight.grad - before
    assert not torch.allclose(sum_counts(added), 2 * added)  # the ranks' own, not yet exchanged
    shared[1].running_mean.fill_(rank())
    average_buffers(shared)
    assert shared[1].running_mean.tolist() == [0.5] * 4

def main(config):
    join_ranks()
    if config.way == "numbers":
        numbers()
        print("all numbers agree", flush=True)
        return
    wait_for_all()
    print("ready", flush=True)
    if config.way == "input":
        raise InputError("--flag 7: bad; take 6.")
    if config.way == "one" and rank() == 1:
        raise InputError("--flag 8: bad here; take 6.")
    if config.way == "killed" and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        sum_counts(torch.ones(1))
        time.sleep(0.01)

run_command(with_one_voice(main), Config, "test")
"""


def torchrun(*arguments, cwd):
    """Start two ranks and return the process that torchrun is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process, name, timeout_s=300):
    """Wait for torchrun's end; return its stdout, and what the ranks, not torchrun, said on stderr."""
    stdout, stderr = process.communicate(timeout=timeout_s)
    return stdout, [line for line in stderr.splitlines() if line.startswith(f"{name}: ")], stderr


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "ranks.py"
    path.write_text(SCRIPT)
    return path


def test_shares_sums_batch_norm_and_loss_are_those_of_one_process(script, tmp_path):
    process = torchrun(script, cwd=tmp_path)
    stdout, _, stderr = said(process, "ranks.py")
    assert process.returncode == 0, stderr
    assert stdout.split("\n") == ["all numbers agree", ""]  # the main rank's word alone


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("input", "--flag 7: bad; take 6."),
        ("one", "--flag 8: bad here; take 6."),
        ("killed", "another rank ended without a word"),
        ("ctrl-c", "stopped by Ctrl-C"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to a child there")
def test_whatever_ends_a_rank_ends_all_with_one_message(script, tmp_path, way, words):
    process = torchrun(script, "--way", way, cwd=tmp_path)
    if way == "ctrl-c":
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, lines, stderr = said(process, "ranks.py")
    assert process.returncode != 0
    assert len(lines) == 1, stderr
    assert words in lines[0]
    assert way != "ctrl-c" or time.monotonic() - started < 25  # torchrun kills only after 30 s


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
    config = share_batch(TrainConfig(batch_size=batch, accumulate=accumulate), before, now, Path("run"))
    assert (config.batch_size, config.accumulate) == expected
    assert config.batch_size * config.accumulate * now == batch * accumulate * before


def test_slabs_that_ranks_cannot_share_are_refused(input_error):
    with input_error("--nproc-per-node", "16 slabs", "results/run"):
        share_batch(TrainConfig(), 1, 3, Path("results/run"))


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
    split = split_cases(find_cases(phantom_cohort, ("flair",)), fractions=(0.25, 0.375, 0.375))
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
    settings += ("--cache-dir", "cache_of_two")  # empty, so that the ranks decode too
    process = torchrun(ROOT / "final_evaluation_v2.py", "--run", "results/two", *settings, cwd=trained)
    stdout, _, stderr = said(process, "final_evaluation_v2.py")
    assert process.returncode == 0, stderr
    assert stdout.count("report: ") == 1
    assert stdout.count("2 made now") == 3  # of the three cases of each cohort, the main rank's share

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
    table, counts, bins = final_evaluation_v2.evaluate_cohort(None, "validation", list(values), {"b"}, 16)
    assert table["case"].tolist() == list(values)
    assert table["seen_in_training"].tolist() == [False, True, False]
    assert (counts["tta"] == 3).all()
    assert (bins["tta"] == 0).all()


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


def test_a_broken_case_of_one_rank_ends_inference_with_one_sentence(trained, external_cohort, tmp_path):
    name = spoil_second(external_cohort, tmp_path / "broken")
    settings = ("--checkpoint", trained / "results" / "one" / "best.pt", "--device", "cpu")
    process = torchrun(ROOT / "inference_v2.py", "--input", "broken", *settings, cwd=tmp_path)
    _, lines, stderr = said(process, "inference_v2.py")
    assert process.returncode != 0
    assert len(lines) == 1, stderr
    assert name in lines[0]
    assert f'File "{ROOT / "inference_v2.py"}"' not in stderr  # no traceback but torchrun's own
    assert not (tmp_path / "predictions" / "volumes.csv").exists()
