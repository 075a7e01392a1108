"""Kill training at random moments, resume it, and compare it to the bit with a run that nobody killed.

    python tests/kill_trials.py --trials 50 --seed 0             SIGKILL, the table of tests/README.md
    python tests/kill_trials.py --trials 20 --signal SIGTERM     the same where a run may still save its place

One process imports the commands once and forks a process per run (two per run of two ranks), so a trial takes
seconds. Each line of the output is a trial as JSON, the last one sums up. Exit code 1: one did not survive.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
import torch._dynamo  # with what else a run would import later, once for all
import torchvision.ops  # noqa: F401

import train_drunet_v2 as train
from audit import overlays, plots
from cohort import phantom
from runtime import command, ranks
from runtime.checkpoints import load_checkpoint

TINY = ["--size", "48", "--widths", "4", "8", "16", "--slabs-per-epoch", "40", "--learning-rate", "3e-2"]
TINY += ["--device", "cpu", "--no-amp", "--no-probe", "--epochs", "3", "--drop-by", "9"]
ONE = [*TINY, "--batch-size", "8"]
# kind: flags, ranks, start method of loader workers
KINDS: dict[str, tuple[list[str], int, str]] = {
    "plain": ([*ONE, "--workers", "0"], 1, "fork"),
    "EMA": ([*ONE, "--workers", "0", "--ema", "0.9"], 1, "fork"),
    "accumulation": ([*ONE, "--workers", "0", "--accumulate", "2"], 1, "fork"),
    "plateau": ([*ONE, "--workers", "0", "--patience", "0", "--warmup-steps", "3"], 1, "fork"),
    "two workers": ([*ONE, "--workers", "2"], 1, "fork"),
    "two ranks": ([*TINY, "--batch-size", "4", "--workers", "0", "--ema", "0.9"], 2, "fork"),
    "spawn": ([*ONE, "--workers", "1"], 1, "spawn"),
}
HANG_S = 600
TIMES = {
    "minutes",
    "slabs_per_second",
    "waiting_share",
    "peak_memory_gb",
}  # of log.csv, differ from run to run


class Moment(NamedTuple):
    """When a run is killed, and which of its ranks."""

    in_training: bool  # the time counts from the first step on, else from the start of the program
    wait_s: float
    victim: int


def run_command(folder: Path, flags: list[str], method: str) -> None:
    """Train in this forked process and end it; what it says goes to said.txt."""
    code = 1
    try:
        os.chdir(folder)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = [str(Path(train.__file__)), *flags]
        torch.multiprocessing.set_start_method(method, force=True)
        command.run_command(ranks.end_together(train.main), train.TrainConfig, "", train.choose_settings)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for child in torch.multiprocessing.active_children():
            child.terminate()
        os._exit(code)


def start(folder: Path, flags: list[str], count: int, method: str) -> list[int]:
    """Fork the process of each rank and return their ids."""
    environment: dict[str, str] = {}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            if count > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            run_command(folder, flags, method)
        pids.append(pid)
    return pids


def draw_nothing(path: Path, *_: object) -> None:
    """Stand in for a plot: drawing takes as long as the rest of so small a run."""
    path.touch()


def wait_for(pids: list[int]) -> list[int]:
    """Return the exit codes of processes; those that take too long are killed."""
    codes, deadline = {}, time.monotonic() + HANG_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def differences(folder: Path, reference: Path) -> list[str]:
    """Return what differs between two finished runs: all of both checkpoints but times, and the log."""
    found = []
    for name in ("best.pt", "last.pt"):
        one, other = load_checkpoint(folder / name), load_checkpoint(reference / name)
        for content in (one, other):
            content["config"] = {**content["config"], "resume": None, "run": None}
            content.pop("minutes", None)
            content["log"] = [
                {name: figure for name, figure in row.items() if name not in TIMES}
                for row in content.get("log", [])
            ]
            for key in [key for key in content if "sha256" in key and key != "split_sha256"]:
                if key != "weights_sha256":
                    del content[key]  # a digest over the times too
        found += [f"{name}: {place}" for place in compare(one, other)]
    logs = [pd.read_csv(path / "log.csv", dtype=str) for path in (folder, reference)]
    logs = [log.drop(columns=[column for column in log if column in TIMES]) for log in logs]
    return found + ([] if logs[0].equals(logs[1]) else ["log.csv"])


def compare(one: Any, other: Any, place: str = "") -> list[str]:
    """Return the places where two nested values differ, tensors to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        is_same = one.dtype == other.dtype and one.shape == other.shape
        same = is_same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{place} has other keys"]
        return [found for key in one for found in compare(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in compare(a, b, f"{place}/{index}")]
    return [] if one == other else [place]


def kill_and_resume(kind: str, folder: Path, moment: Moment, number: int) -> dict[str, Any]:
    """Kill a run at a moment, go on with it, and return how it went."""
    in_training, wait_s, victim = moment
    flags, count, method = KINDS[kind]
    data = ["--data-dir", str(folder.parent / "phantoms"), "--cache-dir", str(folder.parent / "cache")]
    flags = [*data, *flags, "--run", "run"]
    folder.mkdir()
    pids = start(folder, flags, count, method)
    if in_training:
        deadline = time.monotonic() + HANG_S
        while not (folder / "results" / "run" / "batch.png").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(wait_s)
    targets = pids if number != signal.SIGKILL else [pids[victim % count]]
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    codes = wait_for(pids)
    last = folder / "results" / "run" / "last.pt"
    came_from = "anew"
    if last.exists():
        checkpoint = load_checkpoint(last)
        steps = (checkpoint.get("place") or {}).get("draws", 0)
        came_from = f"epoch {checkpoint['epoch']}" + (f", {steps} slabs into the next" if steps else "")
        flags = ["--resume", "results/run"]
    end = wait_for(start(folder, flags, count, method))
    result = {
        "kind": kind,
        "in_training": in_training,
        "killed_after_s": round(wait_s, 2),
        "exit_codes": codes,
        "went_on_from": came_from,
    }
    if any(end):
        return result | {"survived": False, "differs": [f"the second run ended with {end}"]}
    found = differences(folder / "results" / "run", folder.parent / kind / "results" / "run")
    there, whole = (set(path.rglob("*")) for path in (folder / "results", folder.parent / kind / "results"))
    names = {path.relative_to(folder / "results") for path in there}
    expected = {path.relative_to(folder.parent / kind / "results") for path in whole}
    found += [f"left behind: {name}" for name in names - expected]
    found += [f"not written: {name}" for name in expected - names]
    return result | {"survived": not found, "differs": found}


def main() -> None:
    """Run the trials and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    number = signal.Signals[arguments.signal]
    draw = random.Random(arguments.seed)
    plots.plot_curves = overlays.plot_batch = draw_nothing
    results = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        phantom.write_cohort(root / "phantoms", 6, 0, (16, 48, 48), (10.0, 5.0, 5.0), "internal")
        seconds = {}
        tried = 0
        while len(results) < arguments.trials:
            kind = arguments.kinds[len(results) % len(arguments.kinds)]
            flags, count, method = KINDS[kind]
            if kind not in seconds:  # the run that nobody kills
                (root / kind).mkdir()
                data = ["--data-dir", str(root / "phantoms"), "--cache-dir", str(root / "cache")]
                for attempt in (0, 1):  # once to fill the cache, then to see how long it takes
                    shutil.rmtree(root / kind / "results", ignore_errors=True)
                    started = time.monotonic()
                    codes = wait_for(start(root / kind, [*data, *flags, "--run", "run"], count, method))
                    if any(codes):
                        sys.exit((root / kind / "said.txt").read_text())
                    whole_s = time.monotonic() - started
                    first_step = (root / kind / "results" / "run" / "batch.png").stat().st_mtime
                    seconds[kind] = (whole_s, time.time() - first_step)
                    if attempt == 0 and len(seconds) > 1:
                        break
            in_training = draw.random() < 0.8  # a run of three epochs spends half its time before the first
            moment = Moment(in_training, draw.uniform(0, seconds[kind][in_training]), draw.randrange(2))
            tried += 1
            folder = root / f"trial {tried}"
            result = kill_and_resume(kind, folder, moment, number)
            if not any(result["exit_codes"]):
                continue  # it had ended before
            results.append(result)
            print(json.dumps(result), flush=True)
            if not results[-1]["survived"]:
                print((folder / "said.txt").read_text(), file=sys.stderr)
            shutil.rmtree(folder)
    survived = sum(result["survived"] for result in results)
    anew = sum(result["went_on_from"] == "anew" for result in results)
    summary = {"signal": number.name, "trials": len(results), "survived": survived, "anew": anew}
    print(json.dumps(summary | {"resumed": len(results) - anew}))
    sys.exit(survived != len(results))


if __name__ == "__main__":
    main()
