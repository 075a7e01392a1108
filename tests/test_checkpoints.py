"""Checkpoints are proved sound before they are used."""

import errno
import math
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.checkpoints import (
    CHECKPOINT_FORMAT,
    load_checkpoint,
    newest_run,
    save_checkpoint,
    weights_sha256,
)
from runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
ExpectInputError = Callable[..., AbstractContextManager[None]]


def write_run(folder: Path, time: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "best.pt").touch()
    os.utime(folder / "best.pt", (time, time))
    return folder


def test_newest_run_is_told_by_its_checkpoint_not_by_its_name(tmp_path: Path) -> None:
    write_run(tmp_path / "z", 1_000)
    newest = write_run(tmp_path / "a", 3_000)
    write_run(tmp_path / "m", 2_000)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "last.pt").touch()
    os.utime(newest, (0, 0))  # the folder's own time says when a file came or went
    assert newest_run(tmp_path) == newest


def test_no_run_is_an_input_error(tmp_path: Path, input_error: ExpectInputError) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with input_error(place, "train_drunet_v2.py"):
            newest_run(place)


def make_content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, 3, 3, generator=generator)
    return {
        "model": {
            "weight": weight,
            "half": weight.half(),
            "brain": weight.bfloat16(),
            "last": weight.clone(memory_format=torch.channels_last),
            "batches": torch.tensor(7),  # BatchNorm counts in an int64 without dimensions
            "flags": torch.tensor([True, False]),
            "nothing": torch.zeros(0, 3),
        },
        "optimizer": {"step": 3, "moments": [torch.ones(2), torch.zeros(3)]},
        "config": {"widths": (4, 8), "learning_rate": 1e-4, "name": "Zürich", "none": None},
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint file."""
    save_checkpoint(tmp_path / "best.pt", make_content())
    return tmp_path / "best.pt"


def test_checkpoint_round_trip(checkpoint: Path) -> None:
    content, loaded = make_content(), load_checkpoint(checkpoint)
    assert loaded["format"] == CHECKPOINT_FORMAT
    assert loaded["weights_sha256"] == weights_sha256(content["model"])
    assert loaded["config"] == content["config"]
    assert isinstance(loaded["config"]["widths"], tuple)
    assert loaded["model"].keys() == content["model"].keys()
    for name, tensor in content["model"].items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert torch.equal(loaded["model"][name], tensor)
    assert loaded["optimizer"]["step"] == 3
    assert torch.equal(loaded["optimizer"]["moments"][0], torch.ones(2))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_saving_does_not_change_what_it_saves(tmp_path: Path) -> None:
    content = make_content()
    save_checkpoint(tmp_path / "best.pt", content)
    assert content.keys() == make_content().keys()


def test_a_loaded_checkpoint_can_be_changed_and_saved_again(checkpoint: Path) -> None:
    # what save writes, load reads: the old digest must not travel along with new weights
    content = load_checkpoint(checkpoint)
    content["model"]["weight"] = content["model"]["weight"] + 1
    save_checkpoint(checkpoint, content)
    assert torch.equal(load_checkpoint(checkpoint)["model"]["weight"], make_content()["model"]["weight"] + 1)


def test_weights_digest_tells_names_types_shapes_and_values_apart() -> None:
    weight = torch.arange(6, dtype=torch.float32)
    states = [
        {"a": weight},
        {"b": weight},
        {"a": weight.reshape(2, 3)},
        {"a": weight.reshape(3, 2)},
        {"a": weight.view(torch.int32)},  # the same bytes
        {"a": weight.index_fill(0, torch.tensor([5]), math.nextafter(5, 6))},
        {"a": torch.nextafter(weight, torch.tensor(9.0))},
        {"a": weight, "b": torch.zeros(0)},
        {"a": weight[:3], "b": weight[3:]},
        {},
    ]
    digests = [weights_sha256(state) for state in states]
    assert digests[5] == digests[0]  # a step of float64 is none in float32
    assert len(set(digests)) == len(states) - 1


def test_weights_digest_is_blind_to_order_and_memory_layout() -> None:
    first, second = torch.randn(2, 3, 4, 5), torch.ones(2)
    digest = weights_sha256({"a": first, "b": second})
    assert weights_sha256({"b": second, "a": first}) == digest
    assert weights_sha256({"a": first.to(memory_format=torch.channels_last), "b": second}) == digest
    strided = torch.ones(4)[::2].requires_grad_()
    assert weights_sha256({"a": first, "b": strided}) == digest


def test_missing_checkpoint_is_an_input_error(tmp_path: Path, input_error: ExpectInputError) -> None:
    for path in (tmp_path / "best.pt", tmp_path):
        with input_error(path, "train_drunet_v2.py"):
            load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a checkpoint\n", b"PK\x03\x04 not quite a zip"])
def test_bytes_that_are_no_checkpoint_are_an_input_error(
    content: bytes, tmp_path: Path, input_error: ExpectInputError
) -> None:
    path = tmp_path / "best.pt"
    for data in (content, content + np.random.default_rng(0).bytes(5000)):
        path.write_bytes(data)
        with input_error(path):
            load_checkpoint(path)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9, 0.99, -1])
def test_truncated_checkpoint_is_an_input_error(
    kept: float, checkpoint: Path, input_error: ExpectInputError
) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: -1 if kept == -1 else int(kept * len(whole))])
    with input_error(checkpoint):
        load_checkpoint(checkpoint)


def test_a_flipped_bit_never_yields_other_weights(checkpoint: Path) -> None:
    whole, sound = checkpoint.read_bytes(), weights_sha256(make_content()["model"])
    weight = make_content()["model"]["weight"].numpy().tobytes()
    places = np.random.default_rng(0).integers(0, len(whole), 60).tolist()
    refused = 0
    for place in [whole.index(weight) + 200, *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        checkpoint.write_bytes(damaged)
        try:
            assert weights_sha256(load_checkpoint(checkpoint)["model"]) == sound, place
        except InputError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(3)},  # a plain state dict
        {"model": {"weight": torch.ones(3)}, "epoch": 3},  # another project's
        {"format": "drunet-v1/1", "model": {}, "weights_sha256": ""},
        torch.ones(3),
        [1, 2],
        None,
        {"format": CHECKPOINT_FORMAT},
        {"format": CHECKPOINT_FORMAT, "model": {"weight": torch.ones(3)}},
        {"format": CHECKPOINT_FORMAT, "model": {"weight": torch.ones(3)}, "weights_sha256": None},
    ],
)
def test_foreign_torch_file_is_an_input_error(
    content: object, tmp_path: Path, input_error: ExpectInputError
) -> None:
    path = tmp_path / "best.pt"
    torch.save(content, path)
    with input_error(path):
        load_checkpoint(path)


class MakesFolder:
    """A pickle of this makes a folder when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, input_error: ExpectInputError) -> None:
    path, mark = tmp_path / "best.pt", tmp_path / "the code ran"
    content = make_content()
    content = {"format": CHECKPOINT_FORMAT, "weights_sha256": weights_sha256(content["model"]), **content}

    torch.save({**content, "epoch": MakesFolder(mark)}, path)
    with input_error(path):
        load_checkpoint(path)
    assert not mark.exists()

    path.write_bytes(pickle.dumps({"format": CHECKPOINT_FORMAT, "epoch": MakesFolder(mark)}, protocol=2))
    with input_error(path):
        load_checkpoint(path)
    assert not mark.exists()

    pickle.loads(path.read_bytes())
    assert mark.exists()  # or its absence would prove nothing


def test_altered_weights_are_an_input_error(checkpoint: Path, input_error: ExpectInputError) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["weight"][0, 0, 0, 0] += 1e-6
    torch.save(content, checkpoint)  # a sound file with the old digest
    with input_error(checkpoint, "SHA-256"):
        load_checkpoint(checkpoint)


def test_a_failure_while_saving_leaves_the_old_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.read_bytes()

    def fail(_content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save_checkpoint(checkpoint, make_content())
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
