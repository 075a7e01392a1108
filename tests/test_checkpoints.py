"""Checkpoints are proved sound before they are used."""

import errno
import math
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.checkpoints import (
    CHECKPOINT_FORMAT,
    content_sha256,
    fall_back,
    load_checkpoint,
    load_last,
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
    for path, problem in ((tmp_path / "best.pt", "no such checkpoint"), (tmp_path, "is a folder")):
        with input_error(path, problem, "train_drunet_v2.py"):
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


# ------------------------------------------------------------------------------------------------------------
# All of a file is hashed; the one before stays
# ------------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_changes_what_is_loaded(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    expected = content_sha256(load_checkpoint(checkpoint))
    generator = np.random.default_rng(0)
    refused = 0
    for bit in generator.choice(8 * len(whole), 200, replace=False).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        checkpoint.write_bytes(flipped)
        try:
            assert content_sha256(load_checkpoint(checkpoint)) == expected, bit
        except InputError:
            refused += 1
    assert refused > 25  # the others are padding and the like


@pytest.mark.parametrize(
    "place",
    [
        ("optimizer", "step"),
        ("optimizer", "moments", 1),
        ("config", "learning_rate"),
        ("config", "widths"),
        ("config", "name"),
        ("config",),
        ("model", "weight"),
    ],
)
def test_whatever_is_changed_is_an_input_error(
    place: tuple[str | int, ...], checkpoint: Path, input_error: ExpectInputError
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    value = holder[place[-1]]
    holder[place[-1]] = value + 1e-6 if isinstance(value, torch.Tensor | float) else repr(value)
    torch.save(content, checkpoint)
    with input_error(checkpoint, "SHA-256"):
        load_checkpoint(checkpoint)


def test_content_digest_tells_types_and_structure_apart() -> None:
    weight = torch.arange(4.0)
    contents = [
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": (1,)},
        {"a": [1]},
        {"a": [1, []]},
        {"a": [[1]]},
        {1: "a"},
        {"1": "a"},
        {"a": {}},
        {"a": None},
        {},
        {"a": weight},
        {"a": weight.double()},
        {"a": weight.reshape(2, 2)},
        {"a": {"b": weight}},
        {"a/'b'": weight},
        {"a": "\udcff"},
    ]
    digests = [content_sha256(content) for content in contents]
    assert len(set(digests)) == len(contents)
    assert content_sha256({"b": 2, "a": 1, "sha256": "x"}) == content_sha256({"a": 1, "b": 2})


def test_a_file_of_the_version_before_is_checked_by_its_own_hash(
    tmp_path: Path, input_error: ExpectInputError
) -> None:
    path, content = tmp_path / "best.pt", make_content()
    content |= {"format": "drunet-v2/1", "weights_sha256": weights_sha256(content["model"])}
    torch.save(content, path)
    assert load_checkpoint(path)["optimizer"]["step"] == 3
    content["model"]["weight"][0] += 1
    torch.save(content, path)
    with input_error(path, "SHA-256"):
        load_checkpoint(path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["model", "optimizer"])
def test_nothing_that_is_not_finite_is_written(
    place: str, number: float, checkpoint: Path, input_error: ExpectInputError
) -> None:
    before, content = checkpoint.read_bytes(), make_content()
    (content["model"]["half"] if place == "model" else content["optimizer"]["moments"][1])[0] = number
    with input_error(checkpoint, place, "not finite"):
        save_checkpoint(checkpoint, content)
    assert checkpoint.read_bytes() == before


def test_the_last_two_are_kept_and_a_damaged_one_is_fallen_back_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, input_error: ExpectInputError
) -> None:
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path / "last.pt", {**make_content(), "epoch": epoch})
        save_checkpoint(tmp_path / "best.pt", {**make_content(), "epoch": epoch})
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last_before.pt", "best.pt"}
    assert load_checkpoint(tmp_path / "last_before.pt")["epoch"] == 2
    assert load_last(tmp_path)[0]["epoch"] == 3
    assert load_last(tmp_path)[1] is None

    damaged = bytearray((tmp_path / "last.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "last.pt").write_bytes(damaged)
    content, error = load_last(tmp_path)
    assert content["epoch"] == 2
    fall_back(tmp_path, error)
    assert "last.pt" in caplog.text
    assert "goes on from the epoch before" in caplog.text
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 2
    assert (tmp_path / "last_damaged.pt").read_bytes() == damaged
    assert not (tmp_path / "last_before.pt").exists()

    (tmp_path / "last.pt").write_bytes(damaged)
    with input_error(tmp_path / "last.pt"):  # with none before it
        load_last(tmp_path)


def test_there_is_a_sound_last_checkpoint_at_every_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "last.pt", {**make_content(), "epoch": 1})
    save_checkpoint(tmp_path / "last.pt", {**make_content(), "epoch": 2})
    sync, moments = os.fsync, []

    def look(*_: object) -> None:
        moments.append(load_last(tmp_path)[0]["epoch"])

    monkeypatch.setattr(os, "fsync", lambda handle: (look(), sync(handle)))
    for name in ("link", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *paths, call=call: (look(), call(*paths), look()))
    save_checkpoint(tmp_path / "last.pt", {**make_content(), "epoch": 3})
    assert set(moments) == {2, 3}
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    save_checkpoint(tmp_path / "last.pt", {**make_content(), "epoch": 4})
    assert set(moments) == {2, 3, 4}
    assert load_checkpoint(tmp_path / "last_before.pt")["epoch"] == 3


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes there")
def test_a_disk_that_is_full_at_any_moment_ends_with_a_sentence_and_loses_nothing(
    tmp_path: Path, input_error: ExpectInputError
) -> None:
    import resource

    path = tmp_path / "last.pt"
    save_checkpoint(path, make_content())
    before, size = path.read_bytes(), path.stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, as on a full disk
    try:
        for eighth in range(8):
            resource.setrlimit(resource.RLIMIT_FSIZE, (eighth * size // 8, limits[1]))
            with input_error(path, "disk is full", "--resume"):
                save_checkpoint(path, make_content())
            assert path.read_bytes() == before
            assert list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
