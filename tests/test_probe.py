"""The start-up probe leaves no trace and names the batch that fits; --compile falls back where it fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model_drunet_v2 import DRUNetV2
from runtime.cost import estimate_activation_bytes
from runtime.errors import InputError
from runtime.probe import Batch, compile_network, probe_memory, raise_too_large, try_pass, try_step

CPU = torch.device("cpu")
SHAPE = (4, 3, 16, 16)
BATCH = Batch(SHAPE, CPU, None)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return DRUNetV2(widths=(4, 8)).train()


def step_of(network: nn.Module) -> Callable[[nn.Module], None]:
    """Return the first pass of a compiled network that is to be trained."""
    return lambda compiled: try_step(compiled, network, BATCH)


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


@pytest.mark.parametrize("way", ["probe", "step", "pass", "compile", "failure"])
def test_probe_leaves_no_trace(network: nn.Module, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    expected = train_losses(network)
    torch.manual_seed(0)
    again = DRUNetV2(widths=(4, 8)).train()
    before = {name: value.clone() for name, value in again.state_dict().items()}

    def fail(slab: Tensor) -> Tensor:
        again(slab)
        torch.randn(3)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda module, **_: fail if way == "failure" else module)
    if way == "probe":
        probe_memory(again, BATCH, lambda: estimate_activation_bytes(again, SHAPE, None, side=4))
    elif way == "step":
        try_step(again, again, Batch(SHAPE, CPU, torch.bfloat16))
    elif way == "pass":
        try_pass(again.eval(), BATCH)
        again.train()
    else:
        compile_network(again, step_of(again))
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

    try_step(forward, network, BATCH)
    assert seen == [SHAPE, (1, 4, 1, 1)]


def test_a_pass_of_inference_runs_under_autocast_without_gradients(network: nn.Module) -> None:
    seen = []

    def forward(slab: Tensor) -> None:
        logits = network(slab)
        seen.append((slab.shape, logits.dtype, logits.requires_grad))

    try_pass(forward, Batch(SHAPE, CPU, torch.bfloat16))
    assert seen == [(SHAPE, torch.bfloat16, False)]


def test_trace_is_wiped_where_the_step_fails(network: nn.Module) -> None:
    state = torch.get_rng_state()
    mean = network.encoder[0].convolutions[1].running_mean.clone()

    def fill_the_memory(slab: Tensor) -> Tensor:
        network(torch.randn_like(slab)).mean().backward()
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        try_step(fill_the_memory, network, BATCH)
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
    with input_error(f"--batch-size {batch}: does not fit", "8.0 GiB", words):
        raise_too_large(batch, accumulate, 8.0, lambda size: size <= largest)


def test_with_batch_norm_over_ranks_nothing_smaller_is_tried() -> None:
    with pytest.raises(InputError, match="--batch-size 8 --accumulate 2 may fit"):
        raise_too_large(16, 1, 8.0, None)


def test_compile_falls_back_with_a_warning(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(_: nn.Module, **__: object) -> nn.Module:
        raise RuntimeError("no working C++ compiler\nset CXX")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert compile_network(network, step_of(network)) is network
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "--compile failed (RuntimeError: no working C++ compiler); going on without it"


def test_compile_falls_back_where_the_first_pass_fails(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: nn.Sequential(module))

    def fail(compiled: nn.Module) -> None:
        assert compiled is not network
        raise RuntimeError("no operator")

    assert compile_network(network, fail) is network
    assert "RuntimeError: no operator" in caplog.text


@pytest.mark.parametrize("freeze", [False, True])
def test_compile_gives_the_compiled_network_where_it_works(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, freeze: bool
) -> None:
    caplog.set_level("INFO", "drunet")

    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module, options: dict[str, bool] | None) -> None:
            super().__init__()
            self.inner = inner
            self.options = options

        def forward(self, slab: Tensor) -> Tensor:
            return self.inner(slab)

    monkeypatch.setattr(torch, "compile", Compiled)
    forward = compile_network(network, step_of(network), freeze)
    assert isinstance(forward, Compiled)
    assert forward.inner is network
    assert forward.options == ({"freezing": True} if freeze else None)
    assert caplog.messages == ["the network is compiled"]


def test_on_the_cpu_the_probe_says_what_was_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "drunet")
    layer = nn.Linear(2**13, 2**13, bias=False, device="meta")  # 2**26 weights of 4 bytes are 1/4 GiB
    probe_memory(layer, Batch((16, 3, 256, 256), CPU, None), lambda: 5 * 2**29)
    (line,) = caplog.messages
    assert "a step of 16 slabs keeps 2.50 GiB of activations beside 1.00 GiB of weights" in line
    assert "counted, not run" in line
