"""Steps whose gradient is not finite change nothing, are counted and named, and end a run of such steps."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset_balance_v2 import BalancedSampler, make_train_loader
from inference_v2 import UNKNOWN_FRAME
from model_drunet_v2 import DRUNetV2
from runtime.errors import InputError
from runtime.place import start_epoch
from runtime.state import Clock, Recipe, TrainState, start_state
from runtime.steps import MOST_IN_A_ROW
from train_drunet_v2 import train_one_epoch, validate_epoch
from training.run import Run
from training.settings import TrainConfig

CPU = torch.device("cpu")
BATCH, ROWS = 2, 12


class NoiseSlabs:
    """Slabs of noise, one per row, each a case of its own; those of `spoilt` rows are NaN."""

    def __init__(self, spoilt: frozenset[int] = frozenset()) -> None:
        self.cases = [SimpleNamespace(case_id=f"case-{index:02d}") for index in range(ROWS)]
        self.rows = np.array([(index, 0) for index in range(ROWS)])
        self.spoilt = spoilt

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(key[1]))
        return noise[:3] * (torch.nan if key[0] in self.spoilt else 1), (noise[3:] > 1).float()


def make_loader(steps: int, spoilt: frozenset[int] = frozenset()) -> DataLoader:
    sampler = BalancedSampler(np.full(ROWS, 1 / ROWS), steps * BATCH, seed=5)
    return make_train_loader(NoiseSlabs(spoilt), sampler, BATCH)


def make_run(**settings: object) -> Run:
    config = TrainConfig(widths=(4, 8), size=16, batch_size=BATCH, warmup_steps=0, **settings)
    return Run(config, Path("results/made"), CPU, None, {"data_kind": "phantom"})


def make_state(dtype: torch.dtype | None = None) -> TrainState:
    torch.manual_seed(1)
    network = DRUNetV2(3, 1, (4, 8))
    return start_state(network, Recipe(1e-2, 1e-3, 5, 1e-2, 0.9, dtype))


def make_infinite(state: TrainState, passes: Callable[[int], bool]) -> Callable[[], None]:
    """Make the gradient of the head infinite in the backward passes asked for; return what ends this."""
    seen = iter(range(10**6))

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * torch.inf if passes(next(seen)) else gradient

    return state.network.head.weight.register_hook(spoil).remove


class StopAfter(Clock):
    """A clock that is out after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(None)
        self.left = steps

    def is_out(self) -> bool:  # noqa: D102
        self.left -= 1
        return self.left == 0


def contents(state: TrainState) -> dict[str, object]:
    """Return all of a state but how often batch norm was asked."""
    content = copy.deepcopy(state.to_checkpoint())
    for name in ("model", "network"):
        content[name] = {k: v for k, v in content[name].items() if not k.endswith("num_batches_tracked")}
    return content


def assert_same(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fault", ["gradient", "slab"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(
    fault: str, accumulate: int, caplog: pytest.LogCaptureFixture
) -> None:
    run, bad, good = make_run(accumulate=accumulate), make_state(), make_state()
    expected = train_one_epoch(
        run, good, make_loader(2 * accumulate), StopAfter(accumulate), start_epoch(CPU)
    )
    # the first pass of the second step, so that with two passes the other one alone is sound
    keys = list(make_loader(2 * accumulate).sampler)
    second = [row for row, _ in keys[BATCH * accumulate :]]
    assert not {row for row, _ in keys[: BATCH * accumulate]} & set(second[:BATCH])  # or the first is spoilt
    spoilt = frozenset(second[:BATCH]) if fault == "slab" else frozenset()
    if fault == "gradient":
        make_infinite(bad, lambda number: number == accumulate)
    figures = train_one_epoch(run, bad, make_loader(2 * accumulate, spoilt), Clock(None), start_epoch(CPU))
    assert_same(contents(bad), contents(good))
    assert bad.step == 1
    for name in ("train_loss", "train_dice"):
        assert figures[name] == expected[name]
    assert (figures["steps_left_out"], figures["steps_overflowed"]) == (1, 0)
    (sentence,) = caplog.messages
    assert sentence.endswith("its cases: " + ", ".join(sorted({f"case-{row:02d}" for row in second})))


def test_batches_that_fill_no_step_are_left_out_too() -> None:
    run, bad, good = make_run(accumulate=2), make_state(), make_state()
    train_one_epoch(run, good, make_loader(3), StopAfter(2), start_epoch(CPU))
    keys = list(make_loader(3).sampler)
    last = frozenset(row for row, _ in keys[2 * BATCH :])
    assert not last & {row for row, _ in keys[: 2 * BATCH]}
    figures = train_one_epoch(run, bad, make_loader(3, last), Clock(None), start_epoch(CPU))
    assert figures["steps_left_out"] == 1
    assert_same(contents(bad), contents(good))


def test_ten_in_a_row_end_the_run_and_nine_do_not(input_error: Callable) -> None:
    run, state = make_run(), make_state()
    end = make_infinite(state, lambda number: number > 0)
    figures = train_one_epoch(run, state, make_loader(MOST_IN_A_ROW), Clock(None), start_epoch(CPU))
    assert figures["steps_left_out"] == MOST_IN_A_ROW - 1
    end()
    figures = train_one_epoch(
        run, state, make_loader(1), Clock(None), start_epoch(CPU)
    )  # and a sound one sets the count back
    assert figures["steps_left_out"] == state.left_out_in_a_row == 0
    make_infinite(state, lambda number: number in range(1, 5) or number > 5)
    state.epoch = 3
    train_one_epoch(run, state, make_loader(7), Clock(None), start_epoch(CPU))
    with input_error("the gradient", "10 steps in a row", "results/made", "epoch 3", "--init"):
        train_one_epoch(run, state, make_loader(40), Clock(None), start_epoch(CPU))


def test_an_epoch_without_a_sound_step_ends_the_run(input_error: Callable) -> None:
    state = make_state()
    make_infinite(state, lambda _: True)
    with input_error("the loss", "epoch 1", "--learning-rate"):
        train_one_epoch(make_run(), state, make_loader(3), Clock(None), start_epoch(CPU))


def test_an_overflow_of_float16_is_the_scalers_and_counted_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = make_state(torch.float16)
    train_one_epoch(make_run(), state, make_loader(1), Clock(None), start_epoch(CPU))
    before = contents(state)
    make_infinite(state, lambda number: number < 3)
    figures = train_one_epoch(make_run(), state, make_loader(4), Clock(None), start_epoch(CPU))
    assert (figures["steps_left_out"], figures["steps_overflowed"]) == (0, 3)
    assert state.scaler.get_scale() == 65536 / 2**3
    assert state.step == before["step"] + 1
    assert not caplog.messages
    # a loss that is not finite is no overflow of a scaled gradient, nor is one at a scale below 1
    figures = train_one_epoch(
        make_run(), state, make_loader(4, frozenset(range(6))), Clock(None), start_epoch(CPU)
    )
    assert figures["steps_left_out"] > figures["steps_overflowed"] == 0
    make_infinite(state, lambda number: number > 0)
    with pytest.raises(InputError, match="in a row"):
        train_one_epoch(make_run(), state, make_loader(60), Clock(None), start_epoch(CPU))
    assert state.scaler.get_scale() < 1


def test_a_network_that_gives_nan_is_not_validated_but_named_with_where_the_run_stands(
    input_error: Callable,
) -> None:
    state = make_state()
    state.epoch = 4
    with torch.no_grad():
        state.network.head.bias.fill_(torch.nan)
        state.average.module.head.bias.fill_(torch.nan)
    case = SimpleNamespace(
        volume=np.zeros((1, 2, 16, 16), np.float32),
        reference=np.ones((1, 2, 16, 16), bool),
        brain_voxels=np.array([256, 256]),
        frame=UNKNOWN_FRAME,
    )
    with input_error("the network", "not finite", "results/made", "epoch 4", "best.pt"):
        validate_epoch(make_run(), state, [case])
