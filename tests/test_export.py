"""Exported networks: the same probabilities as the checkpoint, any batch size, all that a user must know."""

import builtins
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import export_v2
from export_v2 import ExportConfig, describe_checkpoint
from inference_v2 import (
    InferenceConfig,
    TrainedModel,
    load_model,
    predict_volume,
)
from inference_v2 import main as segment
from model_drunet_v2 import DRUNetV2
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.files import file_sha256
from runtime.onnx_file import _choose_providers

CPU = torch.device("cpu")
SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of two regions whose batch norms have seen data and whose probabilities spread over 0..1."""
    torch.manual_seed(0)
    network = DRUNetV2(3, 2, (4, 8)).train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(4, 3, SIZE, SIZE) * 2 + 1)
        network.head.weight.mul_(60)
        network.head.bias.zero_()
    config = {"modalities": ("flair",), "regions": ("WT", "TC"), "context": 1, "size": SIZE, "widths": (4, 8)}
    config |= {"compress": True}
    content = {
        "model": network.state_dict(),
        "config": config | {"data_dir": "a/private/place"},
        "thresholds": [0.35, 0.6],
        "data_kind": "phantom",
        "seen": [["case-7", "patient-7", "0" * 64]],
    }
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def onnx_file(checkpoint: Path) -> Path:
    """The checkpoint as ONNX, written by the command."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export_v2.main(ExportConfig(checkpoint=str(checkpoint)))
    return checkpoint.with_name("model.onnx")


def predict(model: TrainedModel, depth: int) -> np.ndarray:
    volume = np.random.default_rng(depth).uniform(-3, 3, (1, depth, 30, 28)).astype(np.float32)
    return predict_volume(model, volume, batch_size=7)


def test_onnx_predicts_as_the_checkpoint_at_any_batch_size(checkpoint, onnx_file):
    expected, found = (load_model(path, CPU, amp=False) for path in (checkpoint, onnx_file))
    for depth in (1, 5):  # forward passes of 3 slabs; of 6, 6 and 3
        probabilities = predict(found, depth)
        assert probabilities.max() - probabilities.min() > 0.3
        np.testing.assert_allclose(probabilities, predict(expected, depth), atol=1e-5)


def test_onnx_knows_what_the_checkpoint_knew_and_no_patient(checkpoint, onnx_file):
    expected, found = (load_model(path, CPU, amp=False) for path in (checkpoint, onnx_file))
    for name in ("modalities", "regions", "context", "size", "thresholds", "device", "dtype"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.checkpoint["checkpoint_sha256"] == file_sha256(checkpoint)
    assert found.checkpoint["opset"] == 18
    content = onnx_file.read_bytes()
    assert b"private" not in content
    assert b"patient-7" not in content


def test_onnx_names_no_folder_of_the_machine_that_wrote_it(onnx_file):
    assert str(Path(export_v2.__file__).parent).encode() not in onnx_file.read_bytes()


def test_onnx_states_its_opset_and_its_free_batch_size(onnx_file):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    onnx.checker.check_model(model)
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (model.graph.input[0], model.graph.output[0])
    ]
    assert shapes == [["batch", 3, SIZE, SIZE], ["batch", 2, SIZE, SIZE]]


def test_segmenting_with_onnx_writes_the_masks_of_the_checkpoint(
    checkpoint, onnx_file, phantom_cohort, tmp_path
):
    cases = [str(phantom_cohort / f"BraTS2021_9000{number}") for number in (0, 1)]
    for path, name in ((checkpoint, "torch"), (onnx_file, "onnx")):
        config = InferenceConfig(
            input=tuple(cases), checkpoint=str(path), output=str(tmp_path / name), amp=False, device="cpu"
        )
        segment(config)
    tables = [(tmp_path / name / "volumes.csv").read_text() for name in ("torch", "onnx")]
    assert tables[0].replace(str(tmp_path / "torch"), "") == tables[1].replace(str(tmp_path / "onnx"), "")


def test_torch_export_predicts_as_the_checkpoint(checkpoint, tmp_path, caplog):
    caplog.set_level("INFO", "drunet")
    path = tmp_path / "model.pt2"
    export_v2.main(ExportConfig(checkpoint=str(checkpoint), format="torch-export", output=str(path)))
    assert "largest difference of probabilities" in caplog.text
    extra = {"metadata.json": ""}
    network = torch.export.load(str(path), extra_files=extra).module()
    slabs = torch.randn(5, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = torch.sigmoid(load_model(checkpoint, CPU, amp=False).network(slabs))
        np.testing.assert_allclose(torch.sigmoid(network(slabs)), expected, atol=1e-5)
    assert json.loads(extra["metadata.json"])["thresholds"] == [0.35, 0.6]
    with zipfile.ZipFile(path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(export_v2.__file__).parent).encode() not in content  # no folder of this machine


def test_the_check_runs_a_case_and_fails_where_the_file_differs(
    checkpoint, onnx_file, phantom_cohort, caplog
):
    caplog.set_level("INFO", "drunet")
    model = load_model(checkpoint, CPU, amp=False)
    config = ExportConfig(check_input=str(phantom_cohort / "BraTS2021_90002"))
    export_v2.check_export(model, onnx_file, config, 3)
    assert "Dice of the two masks WT 1.0000" in caplog.text
    with torch.no_grad():
        model.network.head.bias += 0.01
    for each in (config, ExportConfig()):
        with pytest.raises(RuntimeError, match=r"model\.onnx"):
            export_v2.check_export(model, onnx_file, each, 3)


def test_post_processing_is_passed_on(checkpoint):
    content = load_checkpoint(checkpoint) | {"postprocessing": {"smallest_mm3": 50}}
    described = describe_checkpoint(checkpoint, content)
    assert described["postprocessing"] == {"smallest_mm3": 50}
    assert "data_dir" not in described["config"]


def test_the_export_of_a_last_checkpoint_has_a_threshold_of_one_half(checkpoint):
    content = load_checkpoint(checkpoint)
    del content["thresholds"]
    assert describe_checkpoint(checkpoint, content)["thresholds"] == [0.5, 0.5]


def test_an_export_replaces_neither_the_checkpoint_nor_a_file_of_others(checkpoint, tmp_path, input_error):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another's")
    link = tmp_path / "link.onnx"
    link.symlink_to(checkpoint)
    before = file_sha256(checkpoint)
    with input_error(other, "--overwrite"):
        export_v2.main(ExportConfig(checkpoint=str(checkpoint), output=str(other)))
    with input_error(link, "never"):
        export_v2.main(ExportConfig(checkpoint=str(checkpoint), output=str(link), overwrite=True))
    assert other.read_bytes() == b"another's"
    assert file_sha256(checkpoint) == before


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make every import of a package fail as if it were not installed."""
    real = builtins.__import__

    def fail(name: str, *arguments: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}", name=package)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", fail)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_remedy(package, monkeypatch, tmp_path, input_error):
    without(monkeypatch, package)
    with input_error(package, "pip install"):
        export_v2.write_onnx(None, {}, tmp_path / "model.onnx")


def test_onnxruntime_computes_on_the_card_of_the_rank():
    class WithCuda:
        def get_available_providers():
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    for device, card in (("cuda:1", 1), ("cuda", 0)):
        (name, settings), last = _choose_providers(WithCuda, torch.device(device))
        assert (name, settings, last) == (
            "CUDAExecutionProvider",
            {"device_id": card},
            "CPUExecutionProvider",
        )
    assert _choose_providers(WithCuda, CPU) == ["CPUExecutionProvider"]


def test_onnxruntime_missing_is_named_with_the_remedy(monkeypatch, tmp_path, input_error):
    without(monkeypatch, "onnxruntime")
    with input_error("onnxruntime", "pip install"):
        load_model(tmp_path / "model.onnx", CPU)


def cut(path: Path, source: Path) -> None:
    path.write_bytes(source.read_bytes()[:2000])


def strip_metadata(path: Path, source: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(source)
    del model.metadata_props[:]
    onnx.save(model, path)


@pytest.mark.parametrize("spoil", [cut, strip_metadata, None])
def test_onnx_files_that_cannot_be_used_are_named(
    spoil: Callable[[Path, Path], None] | None, onnx_file, tmp_path, input_error
):
    path = tmp_path / "spoilt.onnx"
    if spoil:
        spoil(path, onnx_file)
    with input_error(path):
        load_model(path, CPU)


def test_format_and_file_must_fit(checkpoint, tmp_path, input_error):
    shutil.copy(checkpoint, tmp_path / "model.onnx")
    with input_error(tmp_path / "model.onnx"):  # the suffix says onnxruntime
        load_model(tmp_path / "model.onnx", CPU)
    shutil.copy(tmp_path / "model.onnx", tmp_path / "model.pt2")
    with input_error("--output", ".onnx"):
        export_v2.main(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "model.pt")))


def test_of_a_run_of_folds_one_network_must_be_named(checkpoint, tmp_path, input_error, monkeypatch):
    best = load_checkpoint(checkpoint) | {"postprocessing": {}}
    for fold in (0, 1):
        (tmp_path / f"results/cv/fold_{fold}").mkdir(parents=True)
        save_checkpoint(tmp_path / f"results/cv/fold_{fold}/best.pt", best)
    (tmp_path / "results/cv/config.json").write_text(json.dumps({"folds": 2, "fold": None}))
    monkeypatch.chdir(tmp_path)
    for named in (None, "results/cv"):
        with input_error("results/cv: is a run of 2 folds", "--checkpoint results/cv/fold_0/best.pt"):
            export_v2.choose_checkpoint(named)
    assert export_v2.choose_checkpoint("results/cv/fold_1") == Path("results/cv/fold_1/best.pt")


def test_an_onnx_file_without_input_says_what_to_do(onnx_file, input_error):
    with input_error(onnx_file, "--input"):
        segment(InferenceConfig(checkpoint=str(onnx_file), device="cpu"))
