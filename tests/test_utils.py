"""What the commands share: command line, seeds, devices, files written whole, checkpoints proved sound."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import platform
import random
import resource
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import utils_v2
from utils_v2 import (
    CHECKPOINT_FORMAT,
    InputError,
    amp_dtype,
    build_parser,
    choose_device,
    command_line,
    describe_machine,
    describe_versions,
    file_sha256,
    load_checkpoint,
    newest_run,
    option,
    parse_config,
    peak_memory_gb,
    run_command,
    save_checkpoint,
    set_seed,
    weights_sha256,
    write_atomically,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]
ExpectInputError = Callable[..., AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a made-up command."""

    data_dir: str | None = option(None, "folder of the cohort")
    amp: bool = option(True, "mixed precision")
    plain_loss: bool = option(False, "no focal part")
    device: Literal["auto", "cpu"] = option("auto", "where to compute")
    mode: Literal["fast", "slow"] | None = option(None, "a choice that may be unset")
    threshold: float | None = option(None, "probability from which a voxel is tumour")
    widths: tuple[int, ...] = option((4, 8), "filters per level")
    regions: tuple[str, ...] | None = option(None, "regions")
    learning_rate: float = option(1e-4, "step size")
    seed: int = option(0, "seed of everything")


def parse(*arguments: str) -> Settings:
    return parse_config(Settings, "A made-up command.", arguments)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def test_without_arguments_the_config_is_its_defaults() -> None:
    assert parse() == Settings()
    assert isinstance(parse(), Settings)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ("--amp", "amp", True),
        ("--no-amp", "amp", False),
        ("--plain-loss", "plain_loss", True),
        ("--no-plain-loss", "plain_loss", False),
        ("--device cpu", "device", "cpu"),
        ("--mode slow", "mode", "slow"),
        ("--threshold 0.4", "threshold", 0.4),
        ("--widths 16", "widths", (16,)),
        ("--widths 16 32 64", "widths", (16, 32, 64)),
        ("--regions WT ET", "regions", ("WT", "ET")),
        ("--data-dir some/where", "data_dir", "some/where"),
        ("--data-dir=some/where", "data_dir", "some/where"),
        ("--learning-rate 3e-5", "learning_rate", 3e-5),
        ("--seed -7", "seed", -7),
    ],
)
def test_a_flag_sets_its_field_and_no_other(arguments: str, field: str, value: object) -> None:
    config = parse(*arguments.split())
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)
    assert dataclasses.replace(config, **{field: getattr(Settings(), field)}) == Settings()


@pytest.mark.parametrize(
    "arguments",
    [
        "--width 16",  # abbreviations would change meaning when a flag is added
        "--learning 1",
        "--no-am",
        "--data_dir x",
        "--device tpu",
        "--mode none",
        "--widths",
        "--widths 16 x",
        "--seed 1.5",
        "--learning-rate fast",
        "--amp true",
        "--unknown",
        "stray",
    ],
)
def test_what_the_command_line_does_not_know_ends_with_code_2(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments.split())
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error" in message
    assert any(word in message for word in arguments.split())


def test_command_line_is_read_from_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["made_up.py", "--seed", "3"])
    assert parse_config(Settings, "A made-up command.").seed == 3


def test_help_names_every_flag_its_text_and_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or argparse breaks lines at hyphens
    text = " ".join(build_parser(Settings, "A made-up command.").format_help().split())
    assert "A made-up command." in text
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text
        assert f"{field.metadata['help']} (default: {field.default})" in text
    assert "--no-amp" in text
    assert "{auto,cpu}" in text


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[[Settings], None]
) -> tuple[int, str]:
    """Run a main function as a command; return its exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["/some/where/made_up.py", "--seed", "5"])
    code = 0
    try:
        run_command(main, Settings, "A made-up command.")
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[Settings], None]:
    def main(_config: Settings) -> None:
        raise error

    return main


def test_command_gets_its_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    assert run(monkeypatch, capsys, seen.append) == (0, "")
    assert seen == [Settings(seed=5)]


def test_bad_input_ends_with_one_sentence_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "/data/x.nii: no such file; give --data-dir."
    code, stderr = run(monkeypatch, capsys, raising(InputError(sentence)))
    assert code == 2
    assert stderr == f"made_up.py: error: {sentence}\n"


def test_ctrl_c_ends_with_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert code == 130
    assert len(stderr.strip().splitlines()) == 1
    assert "Ctrl-C" in stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written_ends_with_code_2_and_its_name(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "results/run/last.pt")
    code, stderr = run(monkeypatch, capsys, raising(error))
    assert code == 2
    (line,) = stderr.splitlines()
    assert "results/run/last.pt" in line
    assert os.strerror(number) in line


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), KeyError("a defect"), OSError(errno.EIO, "a defect"), RuntimeError()]
)
def test_a_defect_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as caught:
        run(monkeypatch, capsys, raising(error))
    assert caught.value is error


SCRIPT = """
import dataclasses, signal
from utils_v2 import InputError, option, run_command

@dataclasses.dataclass(frozen=True)
class Settings:
    end: str = option("well", "how to end")

def main(config):
    print("begun", flush=True)
    if config.end == "bad":
        raise InputError("--end bad: not an end; take --end well.")
    if config.end == "ctrl-c":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without
        signal.raise_signal(signal.SIGINT)

run_command(main, Settings, "A made-up command.")
"""


@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [("bad", 2, "made_up.py: error: --end bad: not an end; take --end well."), ("ctrl-c", 130, "Ctrl-C")],
)
def test_a_script_ends_without_a_traceback(end: str, code: int, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "made_up.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "made_up.py", "--end", end],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout == "begun\n"
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line


def test_command_line_is_repeated_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data-dir", "my data", "--note", "it's"]
    monkeypatch.setattr(sys, "argv", ["/some/where/train_drunet_v2.py", *arguments])
    assert command_line().startswith("python train_drunet_v2.py --data-dir 'my data' ")
    assert shlex.split(command_line()) == ["python", "train_drunet_v2.py", *arguments]


# ------------------------------------------------------------------------------------------------------------
# Seeds and devices
# ------------------------------------------------------------------------------------------------------------


def draw_from_each() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 3])
def test_a_seed_sets_python_numpy_and_torch(seed: int) -> None:
    set_seed(seed)
    first = draw_from_each()
    draw_from_each()
    set_seed(seed)
    assert draw_from_each() == first
    set_seed(seed + 1)
    assert all(one != other for one, other in zip(draw_from_each(), first, strict=True))


def without_devices(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in present)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in present)


@pytest.mark.parametrize(
    ("present", "chosen"), [((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")]
)
def test_auto_takes_the_fastest_device_there_is(
    present: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_devices(monkeypatch, *present)
    assert choose_device("auto").type == chosen
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_missing_is_an_input_error(
    name: str, monkeypatch: pytest.MonkeyPatch, input_error: ExpectInputError
) -> None:
    without_devices(monkeypatch)
    with input_error(f"--device {name}", "cpu"):
        choose_device(name)
    without_devices(monkeypatch, name)
    assert choose_device(name).type == name


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_no_mixed_precision_without_amp(name: str) -> None:
    assert amp_dtype(torch.device(name), amp=False) is None


def test_mixed_precision_type_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amp_dtype(torch.device("mps"), amp=True) is None
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None, c=capability: c)
        assert amp_dtype(torch.device("cuda"), amp=True) is dtype


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_cpu_takes_bfloat16_where_it_has_instructions_for_it(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert amp_dtype(torch.device("cpu"), amp=True) is (torch.bfloat16 if avx512 or amx else None)


def test_cpu_does_without_mixed_precision_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert amp_dtype(torch.device("cpu"), amp=True) is None


def test_machine_and_versions_can_stand_in_a_json_file(tmp_path: Path) -> None:
    about = {"hardware": describe_machine(torch.device("cpu")), "versions": describe_versions()}
    write_json(tmp_path / "about.json", about)
    assert about["hardware"]["device"] == "cpu"
    assert about["hardware"]["cpu_cores"] >= 1
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["versions"]["numpy"] == np.__version__


def test_peak_memory_is_in_gib() -> None:
    held = np.ones(2**25)  # 256 MiB, touched
    peak = peak_memory_gb(torch.device("cpu"))
    assert held.nbytes / 2**30 < peak < 64


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_knows_the_unit_of_each_system(
    platform: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _who: usage)
    assert peak_memory_gb(torch.device("cpu")) == 3


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def test_write_atomically_creates_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.csv"
    for text in ("first", "second"):
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "file.csv"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"  # the old file stands until the new one is whole
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_before_anything_is_written_keeps_its_own_error(tmp_path: Path) -> None:
    def write(_temporary: Path) -> None:
        raise RuntimeError("early")

    with pytest.raises(RuntimeError, match="early"):
        write_atomically(tmp_path / "new.csv", write)
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_file_has_the_suffix_and_the_folder_of_the_final_one(tmp_path: Path) -> None:
    # a writer chooses its format by the suffix; a move is atomic within a file system only
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.touch()

    write_atomically(tmp_path / "volume.nii.gz", write)
    assert seen[0].name.endswith("volume.nii.gz")
    assert seen[0].parent == tmp_path
    assert seen[0] != tmp_path / "volume.nii.gz"


def test_write_json_round_trip(tmp_path: Path) -> None:
    content = {"dice": 0.1 + 0.2, "n": 3, "name": "Zürich", "none": None, "list": [1, [2, True]]}
    write_json(tmp_path / "new" / "summary.json", content)
    text = (tmp_path / "new" / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("}\n")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_write_json_refuses_what_json_does_not_know(number: float, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"dice": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"dice": {"mean": [0.5, number]}})
    assert json.loads(path.read_text()) == {"dice": 0.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 3, 2**20, 2**20 + 1, 3 * 2**20 - 1])
def test_file_sha256_over_all_blocks(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_file_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "file") == expected


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


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(utils_v2.torch, "save", fail)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save_checkpoint(checkpoint, make_content())
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_kept_by_every_command():
    code = """
import resource, sys
from dataclasses import dataclass
import numpy as np
from utils_v2 import run_command

@dataclass(frozen=True)
class Config:
    pass

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 26, np.uint8)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main(config):
    first = faults()
    print(first, sum(faults() for _ in range(10)))

if sys.argv.pop() == "command":
    run_command(main, Config, "")
else:
    main(None)
"""
    fetched = {}
    for way in ("command", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", code, way], capture_output=True, text=True, check=True, cwd=ROOT
        )
        fetched[way] = [int(value) for value in done.stdout.split()]
    first, later = fetched["command"]
    assert later < first / 10
    assert fetched["plain"][1] > 5 * fetched["plain"][0]  # without it each block is fetched anew
