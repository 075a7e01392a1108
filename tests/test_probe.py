"""The start-up probe leaves no trace and names the batch that fits; --compile falls back where it fails."""

import pytest
import torch
from torch import Tensor, nn

import probe_v2
from inference_v2 import build_network
from probe_v2 import compile_network, probe_memory, raise_too_large, try_step
from utils_v2 import InputError

CPU = torch.device("cpu")
SHAPE = (4, 3, 16, 16)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(1, 1, 1, (4, 8)).train()


def train_losses(network: nn.Module) -> list[float]:
    """Return the losses of three steps whose slabs come from torch's own generator."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = network(torch.randn(SHAPE)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", ["probe", "step", "compile", "failure"])
def test_probe_leaves_no_trace(network: nn.Module, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    expected = train_losses(network)
    torch.manual_seed(0)
    again = build_network(1, 1, 1, (4, 8)).train()
    before = {name: value.clone() for name, value in again.state_dict().items()}

    def fail(slab: Tensor) -> Tensor:
        again(slab)
        torch.randn(3)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda module: fail if way == "failure" else module)
    if way == "probe":
        assert "keeps" in probe_memory(again, SHAPE, CPU, None)
    elif way == "step":
        try_step(again, again, SHAPE, CPU, torch.bfloat16)
    else:
        compile_network(again, SHAPE, CPU, None)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    assert all(parameter.grad is None for parameter in again.parameters())
    assert again.training
    assert train_losses(again) == expected


def test_a_step_does_run_the_network_forward_and_back(network: nn.Module) -> None:
    seen = []

    def forward(slab: Tensor) -> Tensor:
        logits = network(slab)
        network.head.weight.register_hook(lambda gradient: seen.append(gradient.shape))
        seen.append(slab.shape)
        return logits

    try_step(forward, network, SHAPE, CPU, None)
    assert seen == [SHAPE, (1, 4, 1, 1)]


def test_trace_is_wiped_where_the_step_fails(network: nn.Module) -> None:
    state = torch.get_rng_state()
    mean = network.encoder[0].convolutions[1].running_mean.clone()

    def fill_the_memory(slab: Tensor) -> Tensor:
        network(torch.randn_like(slab)).mean().backward()
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        try_step(fill_the_memory, network, SHAPE, CPU, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.encoder[0].convolutions[1].running_mean, mean)
    assert network.head.weight.grad is None


@pytest.mark.parametrize(
    ("batch", "accumulate", "largest", "words"),
    [
        (16, 1, 15, "--batch-size 8 --accumulate 2 fits"),
        (16, 2, 5, "--batch-size 4 --accumulate 8 fits"),
        (12, 1, 5, "--batch-size 4 --accumulate 3 fits"),
        (7, 1, 6, "--batch-size 1 --accumulate 7 fits"),
        (16, 1, 0, "--checkpointing"),
    ],
)
def test_too_large_a_batch_is_named_with_one_that_fits(
    input_error, batch: int, accumulate: int, largest: int, words: str
) -> None:
    with input_error(f"--batch-size {batch} does not fit", "8.0 GiB", words):
        raise_too_large(batch, accumulate, 8.0, lambda size: size <= largest)


def test_with_batch_norm_over_ranks_nothing_smaller_is_tried() -> None:
    with pytest.raises(InputError, match="--batch-size 8 --accumulate 2 may fit"):
        raise_too_large(16, 1, 8.0, None)


def test_compile_falls_back_with_a_warning(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(_: nn.Module) -> nn.Module:
        raise RuntimeError("no working C++ compiler\nset CXX")

    monkeypatch.setattr(torch, "compile", no_compiler)
    forward, line = compile_network(network, SHAPE, CPU, None)
    assert forward is network
    assert line == "warning: --compile failed (RuntimeError: no working C++ compiler); going on without it"


def test_compile_gives_the_compiled_network_where_it_works(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, slab: Tensor) -> Tensor:
            return self.inner(slab)

    monkeypatch.setattr(torch, "compile", Compiled)
    forward, line = compile_network(network, SHAPE, CPU, None)
    assert isinstance(forward, Compiled)
    assert forward.inner is network
    assert "compiled" in line


def test_estimate_on_the_cpu_counts_activations_and_weights(network: nn.Module) -> None:
    assert probe_v2.estimate_activation_bytes(network, SHAPE, None, side=4) > 0
    line = probe_memory(network, (16, 3, 256, 256), CPU, None)
    gib = probe_v2.estimate_activation_bytes(network, (16, 3, 256, 256), None, side=4) / 2**30
    assert f"keeps {gib:.2f} GiB" in line
    assert "counted, not run" in line
