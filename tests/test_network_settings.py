"""What a checkpoint, an ONNX file or the command line says of a network is refused before memory is taken."""

import json
import time
from pathlib import Path

import pytest
import torch

from cohort.initial import read_initial
from cohort.network import check_network_settings
from inference_v2 import load_model
from model_drunet_v2 import DRUNetV2, ModelConfig
from runtime import onnx_file
from runtime.checkpoints import save_checkpoint
from runtime.command import check_settings, from_plain, is_of_type, parse
from runtime.onnx_check import check_onnx
from training.resume import settings_of_resumed
from training.settings import TrainConfig

CPU = torch.device("cpu")
CONFIG = {"modalities": ("flair",), "regions": ("WT",), "context": 1, "size": 32, "widths": (4, 8)}


@pytest.fixture
def write_checkpoint(tmp_path):
    """Function from settings to a checkpoint of them, whose weights are of CONFIG."""
    content = {"model": DRUNetV2(3, 1, (4, 8)).state_dict(), "thresholds": [0.5], "seen": [], "epoch": 1}

    def write(name: str, **settings: object) -> Path:
        save_checkpoint(tmp_path / name, content | {"config": CONFIG | settings})
        return tmp_path / name

    return write


BAD = [
    ({"widths": (10**6,) * 5}, "widths 1000000"),
    ({"widths": (4096,) * 8, "size": 128}, "widths 4096"),
    ({"widths": (4,) * 9}, "2 to 8 values"),
    ({"widths": (4,)}, "2 to 8 values"),
    ({"widths": ("4", "8")}, "widths ('4', '8')"),
    ({"widths": 4}, "widths 4"),
    ({"size": 0}, "size 0"),
    ({"size": 10**9}, "size 1000000000"),
    ({"size": 33}, "multiple of 2"),
    ({"size": 32.5}, "size 32.5"),
    ({"context": 10**7}, "context 10000000"),
    ({"context": -1}, "context -1"),
    ({"context": True}, "context True"),
    ({"context": None}, "context None"),
    ({"modalities": ("flair", "x")}, "modalities ('flair', 'x')"),
    ({"modalities": ()}, "modalities"),
    ({"modalities": ("flair",) * 10**4}, "modalities"),
    ({"regions": ("WT", "WT")}, "regions"),
    ({"use_se": 3}, "use-se 3"),
]


@pytest.mark.parametrize(("settings", "words"), BAD, ids=[words for _, words in BAD])
def test_settings_of_a_checkpoint_are_held_against_their_ranges(
    write_checkpoint, settings, words, input_error
):
    path = write_checkpoint("last.pt", **settings)
    started = time.process_time()
    with input_error(path, words):
        load_model(path, CPU)
    if words not in ("widths 4096", "multiple of 2"):  # in range, and held against the weights
        with input_error(path, words):
            settings_of_resumed(path.parent, parse)
    assert time.process_time() - started < 1


def test_settings_that_are_none_or_missing_are_named(write_checkpoint, input_error):
    for config in (None, [], "x", 3):
        with input_error("x.pt", "does not say"):
            check_network_settings("x.pt", config)
    for name in CONFIG:
        with input_error("x.pt", name):
            check_network_settings("x.pt", {key: value for key, value in CONFIG.items() if key != name})
    with input_error("--init", "context 10000000"):
        read_initial(write_checkpoint("best.pt", context=10**7))


def test_sound_settings_load(write_checkpoint):
    assert load_model(write_checkpoint("best.pt"), CPU).size == 32
    check_network_settings("x", CONFIG | {"widths": [64, 128, 256, 512, 1024], "size": 256, "context": 2})


@pytest.mark.parametrize(
    "typed",
    [
        ["--widths", "1000000", "2000000"],
        ["--widths", "4"],
        ["--size", "0"],
        ["--size", "100000"],
        ["--context", "10000000"],
        ["--workers", "100000"],
        ["--batch-size", "10000000"],
    ],
)
def test_the_command_line_refuses_them_too(typed, input_error):
    with input_error(typed[0]):
        parse(TrainConfig, arguments=typed)


def test_widths_of_too_many_parameters_take_no_memory():
    check_settings(ModelConfig(widths=(4096,) * 8))
    with pytest.raises(ValueError, match="more than"):
        DRUNetV2(3, 1, (4096,) * 8)


def test_a_config_file_with_values_of_another_kind_names_itself(input_error):
    for plain in (
        {"epochs": "many"},
        {"learning_rate": None},
        {"modalities": "flair"},
        {"run": 3},
        {"amp": 1},
    ):
        with input_error("config.json", next(iter(plain)).replace("_", "-")):
            from_plain(TrainConfig, plain, "config.json")
    assert from_plain(TrainConfig, {"learning_rate": 1, "max_minutes": None}).learning_rate == 1


def test_types_are_told_apart():
    assert is_of_type(1, float)
    assert is_of_type(None, float | None)
    for value, hint in ((True, int), (1.0, int), ("1", int), ([1], tuple[int, ...]), (1, str), (True, float)):
        assert not is_of_type(value, hint)


# ------------------------------------------------------------------------------------------------------------
# ONNX
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_onnx():
    """(onnx, model): an addition of a (3, 4) array to a slab."""
    onnx = pytest.importorskip("onnx")
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3, 4], [0.0] * 12)
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3, 4])
        for name in ("slab", "logits")
    ]
    node = onnx.helper.make_node("Add", ["slab", "w"], ["logits"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [values])
    return onnx, onnx.helper.make_model(graph)


def written(path: Path, model) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_a_sound_model_passes_and_each_cut_one_is_refused(tiny_onnx, tmp_path, input_error):
    _, model = tiny_onnx
    path = written(tmp_path / "x.onnx", model)
    check_onnx(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with input_error(path, "not a readable ONNX file"):
        check_onnx(path)
    path.write_bytes(b"")
    with input_error(path, "0 bytes"):
        check_onnx(path)


# ruff: noqa: ARG001
def spoil_external(onnx, model):
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="../../etc/passwd")


def spoil_external_in_a_node(onnx, model):
    tensor = onnx.helper.make_tensor("c", onnx.TensorProto.FLOAT, [1], [0.0])
    tensor.external_data.add(key="location", value="/etc/passwd")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "i", [], [])
    model.graph.node.append(
        onnx.helper.make_node("If", ["slab"], ["z"], then_branch=inner, else_branch=inner)
    )


def spoil_dims(onnx, model):
    model.graph.initializer[0].dims[:] = [10**6, 10**6]


def spoil_negative_dims(onnx, model):
    model.graph.initializer[0].dims[:] = [-3, -4]


def spoil_input(onnx, model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 10**12


def spoil_constant(onnx, model):
    shape = onnx.numpy_helper.from_array(torch.tensor([10**5, 10**5, 10**5]).numpy(), "s")
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["s"], ["z"]))
    model.graph.initializer.append(shape)


def spoil_depth(onnx, model):
    for _ in range(30):
        outer = onnx.helper.make_node("If", ["slab"], ["z"], then_branch=model.graph)
        model.graph.CopyFrom(onnx.helper.make_graph([outer], "g", [], []))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_external, "other files"),
        (spoil_external_in_a_node, "other files"),
        (spoil_dims, "1000000 x 1000000"),
        (spoil_negative_dims, "-3 x -4"),
        (spoil_input, "1000000000000 x 4"),
        (spoil_constant, "100000 x 100000 x 100000"),
        (spoil_depth, "deep"),
    ],
)
def test_what_reads_other_files_or_declares_too_much_never_reaches_onnxruntime(
    tiny_onnx, tmp_path, monkeypatch, spoil, words, input_error
):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_: pytest.fail("opened"))
    onnx, model = tiny_onnx
    spoil(onnx, model)
    path = written(tmp_path / "x.onnx", model)
    with input_error(path, words):
        onnx_file.load_onnx(path, CPU)


def sealed(tiny_onnx, path: Path, config: dict, replaced: bytes = b"") -> Path:
    """Write the model as export_v2.py does, with these settings; the first byte of a text made no UTF-8."""
    onnx, model = tiny_onnx
    properties = {"format": onnx_file.ONNX_FORMAT, "config": json.dumps(config)}
    onnx.helper.set_model_props(model, properties | {"file_sha256": onnx_file.NO_HASH})
    model.ir_version, model.producer_name, model.graph.name = 10, "producer", "a graph"
    model.opset_import[0].version = 18
    content = model.SerializeToString()
    assert replaced in content
    if replaced:
        content = content.replace(replaced, b"\x80" + replaced[1:])
    path.write_bytes(onnx_file.seal(content))
    return path


def test_settings_in_an_onnx_file_are_held_against_their_ranges(tiny_onnx, tmp_path, input_error):
    pytest.importorskip("onnxruntime")
    path = sealed(tiny_onnx, tmp_path / "x.onnx", CONFIG | {"context": 10**7})
    with input_error(path, "context 10000000"):
        load_model(path, CPU)


@pytest.mark.parametrize("text", [b"format", b"drunet-v2-onnx", b"slab", b"logits", b"producer", b"a graph"])
def test_text_in_an_onnx_file_that_is_no_utf8_is_named(tiny_onnx, tmp_path, text, input_error):
    pytest.importorskip("onnxruntime")
    path = sealed(tiny_onnx, tmp_path / "x.onnx", CONFIG, text)
    with input_error(path):
        load_model(path, CPU)
