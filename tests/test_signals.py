"""SIGTERM and Ctrl-C: what is at hand is finished, saved and said; a second one ends at once."""

import ast
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_ranks import said, torchrun

import dataset_balance_v2 as dataset
import final_evaluation_v2
import inference_v2
import train_drunet_v2 as train
from audit import overlays, plots
from cohort.selection import TrainingSource
from inference_v2 import InferenceConfig
from runtime import claims, cpu_threads, ranks, signals
from runtime.checkpoints import load_checkpoint
from runtime.place import restore_place
from runtime.state import Recipe, start_state

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals cannot be sent to a child there")

SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from runtime import ranks, signals
from runtime.command import run_command
from runtime.log import log

@dataclass(frozen=True)
class Config:
    way: str = "finish"
    '''What to do.'''

def main(config):
    ranks.join_ranks()
    signals.hint("go on somehow")
    if config.way == "plain":
        log.info("ready")
        time.sleep(60)
    with signals.finish_first():
        for step in range(6000):
            if step == 3:
                log.info("ready")
            time.sleep(0.01 + 0.01 * ranks.rank())
            if config.way != "deaf" and ranks.agree_to_stop():
                print(f"rank {ranks.rank()} stops at {step}", flush=True)
                raise signals.Stopped(is_agreed=True)

run_command(ranks.end_together(main), Config, "test")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "made_up.py"
    path.write_text(SCRIPT)
    return path


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Start Python; a suite in the background ignores SIGINT, which the child must not."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# ------------------------------------------------------------------------------------------------------------
# The handler
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_the_first_signal_ends_a_command_where_it_can_stop(script, number, code, name):
    for way in ("finish", "plain"):
        process = start(script, "--way", way, cwd=script.parent)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == code
        assert f"made_up.py: stopped by {name}; go on somehow.\n" in stderr
        assert "Traceback" not in stderr
        assert stdout.startswith("rank 0 stops at") == (way == "finish")


def test_a_second_signal_ends_it_at_once(script):
    process = start(script, "--way", "deaf", cwd=script.parent)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "a second one stops at once" in process.stderr.readline() + process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (-signal.SIGINT, 130)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        signals.catch_signals(begin=True)
        signal.raise_signal(signal.SIGHUP)
        assert not signals.is_stopping()
    finally:
        signals.release_signals()
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_imports_is_one_line(tmp_path):
    code = "from runtime import signals; signals.catch_signals(); print('ready', flush=True); import time; "
    process = start("-c", code + "time.sleep(60)", cwd=tmp_path)  # the sleep stands for an import
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.strip().endswith("stopped by Ctrl-C.")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_a_command_catches_signals_before_the_imports_that_take_seconds(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node for node in tree.body if isinstance(node, ast.If)]
    if not any("run_command" in ast.unparse(node) for node in names):
        return  # no command
    for node in tree.body:
        if isinstance(node, ast.If):
            assert "signals.catch_signals()" in ast.unparse(node)
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] in sys.stdlib_module_names


def test_ranks_stop_at_one_step_with_one_message(script):
    process = torchrun(script, cwd=script.parent)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    stdout, lines, stderr = said(process, "made_up.py")
    steps = {line.rpartition(" ")[2] for line in stdout.splitlines() if "stops at" in line}
    assert stdout.count("stops at") == 2, stderr
    assert len(steps) == 1
    ends = [line for line in lines if "stopped by SIGTERM" in line]
    assert len(ends) == 1
    assert 'made_up.py", line' not in stderr  # no traceback but torchrun's own


def test_a_signal_that_comes_while_ranks_ask_counts_the_next_time(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda *_: signals.stop_for(signal.SIGTERM))
    signals.catch_signals(begin=True)
    try:
        assert not ranks.agree_to_stop()  # the other rank has been told that there was none
        assert signals.is_stopping()
        assert ranks.agree_to_stop()
    finally:
        signals.release_signals()


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run commands in this process, which handles no signals and draws nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "plot_curves", lambda path, *_: path.touch())
    monkeypatch.setattr(overlays, "plot_batch", lambda path, *_: path.touch())
    signals.catch_signals(begin=True)
    yield
    signals.release_signals()
    claims.release_claims()
    torch.use_deterministic_algorithms(False)


def settings_of(cohort: Path, name: str) -> train.TrainConfig:
    return train.TrainConfig(
        run=name,
        source=TrainingSource(str(cohort), cache_dir=str(cohort.parent / "cache of signals")),
        size=48,
        widths=(4, 8),
        epochs=2,
        batch_size=4,
        accumulate=2,
        slabs_per_epoch=44,  # 11 steps, of which the last fills no optimiser step
        learning_rate=1e-2,
        ema=0.9,
        schedule="cosine",
        device="cpu",
        amp=False,
        workers=0,
        probe=False,
        deterministic=True,
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, function: str, calls: int) -> None:
    """Send this process a SIGTERM in the given call of a function of training."""
    original, done = getattr(train, function), []

    def call(*arguments: object) -> object:
        done.append(1)
        if len(done) == calls:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train, function, call)


@pytest.fixture
def whole(in_process: None, phantom_cohort: Path) -> Path:  # noqa: ARG001
    """The folder of a run that nothing stopped."""
    train.main(settings_of(phantom_cohort, "whole"))
    return Path("results/whole")


def assert_same_runs(one: Path, other: Path) -> None:
    for name in ("best.pt", "last.pt"):
        contents = [load_checkpoint(folder / name) for folder in (one, other)]
        assert "place" not in contents[0]
        for part in ("model", "network"):
            for key, value in contents[0].get(part, {}).items():
                assert torch.equal(value, contents[1][part][key]), (name, key)
    logs = [pd.read_csv(folder / "log.csv") for folder in (one, other)]
    for column in ("epoch", "learning_rate", "train_loss", "train_dice", "validation_dice_WT"):
        assert logs[0][column].tolist() == logs[1][column].tolist(), column


def test_a_stopped_run_goes_on_with_the_next_draw_and_ends_with_the_same_bits(
    whole: Path, phantom_cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the third step of the first epoch: the fourth fills an optimiser step; amid the last one; in validation
    moments = [("count_step", 3, 4 * 4, False), ("count_step", 11 + 11, 44, True)]
    moments += [("overlap_at_thresholds", 1, 44, True)]
    for index, (function, calls, draws, is_over) in enumerate(moments):
        config = settings_of(phantom_cohort, f"stopped_{index}")
        with monkeypatch.context() as patch:
            stop_after(patch, function, calls)
            with pytest.raises(signals.Stopped) as caught:
                train.main(config)
        assert caught.value.exit_code == 143
        assert f"--resume results/{config.run}" in str(caught.value)
        last = load_checkpoint(Path("results") / config.run / "last.pt")
        assert (last["place"]["draws"], last["place"]["is_over"]) == (draws, is_over)
        signals.catch_signals(begin=True)
        loaded: list[int] = []
        original = dataset.SlabDataset.__getitem__
        with monkeypatch.context() as patch:
            patch.setattr(
                dataset.SlabDataset,
                "__getitem__",
                lambda self, key, get=original, loaded=loaded: loaded.append(1) or get(self, key),
            )
            train.main(dataclasses.replace(config, resume=f"results/{config.run}"))
        assert len(loaded) == (2 - last["epoch"]) * 44 - draws  # nothing is loaded twice
        assert_same_runs(Path("results") / config.run, whole)


def test_sigterm_leaves_a_run_to_resume_and_no_litter(tmp_path: Path, phantom_cohort: Path) -> None:
    flags = ["--size", "48", "--widths", "4", "8", "--batch-size", "4", "--slabs-per-epoch", "64"]
    flags += ["--workers", "2", "--device", "cpu", "--epochs", "500", "--run", "stopped"]
    process = start(ROOT / "train_drunet_v2.py", "--data-dir", phantom_cohort, *flags, cwd=tmp_path)
    folder = tmp_path / "results" / "stopped"
    deadline = time.monotonic() + 600
    while not (folder / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert stderr.count("--resume results/stopped") == 1
    assert not list(folder.glob(".*"))
    assert load_checkpoint(folder / "last.pt")["epoch"] >= 1


def test_deterministic_gives_the_same_bits_for_any_number_of_workers(
    whole: Path, phantom_cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_threads, "choose_threads", lambda _: pytest.fail("threads are not chosen"))
    train.main(dataclasses.replace(settings_of(phantom_cohort, "workers"), workers=2))
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_runs(Path("results/workers"), whole)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_no_loader_worker_outlives_training(
    in_process: None,  # noqa: ARG001
    phantom_cohort: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_stopped: bool,
) -> None:
    held = []  # as an exception that a library keeps holds the loader's frames
    original = train.make_loader
    monkeypatch.setattr(train, "make_loader", lambda *inputs: held.append(original(*inputs)) or held[-1])
    if is_stopped:
        stop_after(monkeypatch, "count_step", 3)
    ends = pytest.raises(signals.Stopped) if is_stopped else contextlib.nullcontext()
    with ends:
        train.main(dataclasses.replace(settings_of(phantom_cohort, "left"), workers=1, epochs=1))
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------------------------
# Audit and inference
# ------------------------------------------------------------------------------------------------------------


def test_an_audit_keeps_and_lists_what_is_done(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = final_evaluation_v2.EvaluationConfig(
        run=str(whole), device="cpu", cache_dir=settings_of(Path(), "x").source.cache_dir
    )
    original = final_evaluation_v2.evaluate_case

    def stop_in_first(*arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(final_evaluation_v2, "evaluate_case", stop_in_first)
        with pytest.raises(signals.Stopped, match=r"1 cases are in .*stopped_per_case.csv"):
            final_evaluation_v2.main(config)
    names = {path.name for path in (whole / "evaluation").iterdir()}
    assert "stopped_per_case.csv" in names
    assert not {"metrics_per_case.csv", "summary.json"} & names
    assert pd.read_csv(whole / "evaluation" / "stopped_per_case.csv")["case"].nunique() == 1
    monkeypatch.setattr(final_evaluation_v2, "draw_figures", lambda *_: [])
    monkeypatch.setattr(final_evaluation_v2, "write_report", lambda *_: None)
    signals.catch_signals(begin=True)
    final_evaluation_v2.main(config)
    names = {path.name for path in (whole / "evaluation").iterdir()}
    assert {"metrics_per_case.csv", "summary.json"} <= names
    assert "stopped_per_case.csv" not in names


def test_inference_keeps_and_lists_what_is_done(
    whole: Path, external_cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InferenceConfig(
        input=(str(external_cohort),), checkpoint=str(whole / "best.pt"), device="cpu", tta=False
    )
    original: Callable[..., object] = inference_v2.predict_case

    def stop_in_first(*arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(inference_v2, "predict_case", stop_in_first)
        with pytest.raises(signals.Stopped, match="1 of 3 cases are done"):
            inference_v2.main(config)
    assert len(pd.read_csv("predictions/volumes.csv")) == 1
    assert len(list(Path("predictions").glob("*_seg.nii.gz"))) == 1
    signals.catch_signals(begin=True)
    inference_v2.main(dataclasses.replace(config, skip_done=True))
    assert len(pd.read_csv("predictions/volumes.csv")) == 3


def test_a_place_of_two_ranks_is_resumed_by_one() -> None:
    network = torch.nn.BatchNorm2d(1)
    recipe = Recipe(1e-3, 1e-4, 1, 0.0, 0.0, None)
    state = start_state(network, recipe)
    shares = [
        {
            "totals": torch.tensor([1.0, 2.0, 3.0, 4.0]) * factor,
            "buffers": [torch.full((1,), float(factor)), torch.full((1,), 1.0), torch.tensor(7)],
            "seconds": 2.0,
            "waited_s": 1.0,
            "left_out": 1,
            "overflowed": 0,
        }
        for factor in (1, 3)
    ]
    place = restore_place({"draws": 24, "is_over": False, "ranks": shares}, state, batch_size=8)
    assert (place.steps, place.left_out) == (3, 1)
    assert place.totals.tolist() == [4.0, 8.0, 12.0, 16.0]  # the figures are sums over ranks
    assert network.running_mean.tolist() == [2.0]
    assert network.num_batches_tracked == 7
    assert restore_place(None, state, 8).steps == 0
