"""Ranks exchange values, train as one and end together; they are real processes under torchrun, on CPUs."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HANG_S = 600  # only a run that hangs takes so long

# What the ranks do: compare numbers, or end in one of the ways in which a run can end.
SCRIPT = """
import os, signal, time, warnings
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from runtime.ranks import *
from runtime.command import run_command
from runtime.errors import InputError
from runtime.log import log
from utils_v2 import HybridFocalDiceLoss

@dataclass(frozen=True)
class Config:
    way: str = "numbers"
    '''What to do.'''

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
    shared = sync_batchnorm(make(), torch.device("cpu"))
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
    with accumulate_gradients(network, True):
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
        warnings.warn("one warning")
        log.info("all numbers agree")
        return
    wait_for_all()
    log.info("ready")
    if config.way == "input":
        raise InputError("--flag 7", "bad", "take 6")
    if config.way == "one" and rank() == 1:
        raise InputError("--flag 8", "bad here", "take 6")
    if config.way == "defect" and rank() == 1:
        raise ZeroDivisionError("a defect")
    if config.way.startswith("killed") and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.way == "killed at the end":
        return
    while True:
        if config.way != "killed":  # then rank 0 waits for nobody: only torchrun can stop it
            sum_counts(torch.ones(1))
        time.sleep(0.01)

run_command(end_together(main), Config, "test")
if Path("/proc/self/task").is_dir():
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert "python" in "".join(threads) and "gloo" not in "".join(threads), threads
"""


def torchrun(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Start two ranks and return the process of torchrun."""
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


def said(process: subprocess.Popen[str], name: str) -> tuple[str, list[str], str]:
    """Wait for the end of torchrun; return its stdout, the errors of the script `name`, and all of stderr."""
    try:
        stdout, stderr = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return stdout, [line for line in stderr.splitlines() if line.startswith(f"{name}: ")], stderr


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Function that starts SCRIPT on two ranks."""
    path = tmp_path / "ranks.py"
    path.write_text(SCRIPT)
    return lambda *arguments: torchrun(path, *arguments, cwd=tmp_path)


def test_shares_sums_batch_norm_and_loss_are_those_of_one_process(start):
    process = start()
    stdout, _, stderr = said(process, "ranks.py")
    assert process.returncode == 0, stderr
    assert stdout == "all numbers agree\n"  # of the main rank alone
    assert stderr.count("UserWarning: one warning") == 1


@pytest.mark.parametrize(
    ("way", "words", "exit_code"),
    [
        ("input", "--flag 7: bad; take 6.", 2),
        ("one", "--flag 8: bad here; take 6.", 2),
        ("killed", "another rank ended without a word", -9),
        ("killed at the end", "another rank ended without a word", -9),
        ("ctrl-c", "stopped by Ctrl-C", None),  # torchrun reports no exit codes
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to a child there")
def test_whatever_ends_a_rank_ends_all_with_one_message(start, way, words, exit_code):
    process = start("--way", way)
    if way == "ctrl-c":
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
    _, lines, stderr = said(process, "ranks.py")
    assert process.returncode != 0
    assert len(lines) == 1, stderr
    assert words in lines[0]
    assert 'ranks.py", line' not in stderr  # no traceback
    assert exit_code is None or f"exitcode  : {exit_code} " in stderr
    assert "forcefully exiting" not in stderr  # of torchrun, about a rank that does not end within 30 s


def test_a_defect_of_one_rank_ends_all_with_its_traceback(start):
    process = start("--way", "defect")
    _, lines, stderr = said(process, "ranks.py")
    assert process.returncode != 0
    assert not lines
    assert stderr.count("ZeroDivisionError: a defect") == 1
    assert "gloo" not in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to a child there")
def test_a_rank_that_waits_for_one_that_never_comes_ends_at_the_first_signal(tmp_path):
    (tmp_path / "ranks.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "ranks.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )
    deadline = time.monotonic() + HANG_S
    is_waiting = False
    while not is_waiting and time.monotonic() < deadline:
        with socket.socket() as other:
            is_waiting = other.connect_ex(("127.0.0.1", port)) == 0
        time.sleep(0.1)
    process.terminate()
    try:
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
