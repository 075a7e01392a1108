"""What the segmentation command does to files: it harms none, passes over bad ones, and says what is odd."""

import dataclasses
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import final_evaluation_v2
import inference_v2
import make_phantom_v2
from audit.output import Output, warn_of_intensities, warn_of_volume
from cohort.cases import LoadedCase, load_case
from cohort.layouts import CaseSource, find_cases
from inference_v2 import (
    InferenceConfig,
    TrainedModel,
    load_model,
    main,
    predict_views,
    predict_volume,
    predict_with_spread,
    segment_cases,
)
from model_drunet_v2 import DRUNetV2
from runtime.checkpoints import save_checkpoint, weights_sha256
from runtime.command import parse
from runtime.errors import InputError
from runtime.exhausted import explain_exhausted
from runtime.files import WRITTEN, is_written_by_us, protect_inputs, write_output

CPU = torch.device("cpu")


def hashes(folder: Path) -> dict[str, str]:
    """Return {path: SHA-256} of the files below a folder, hidden ones left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def cohort(phantom_cohort: Path, tmp_path: Path) -> Path:
    """Folder of three phantoms with FLAIR and mask, for the test to spoil."""
    for case in sorted(phantom_cohort.iterdir())[:3]:
        for name in ("flair", "seg"):
            target = tmp_path / "data" / case.name / f"{case.name}_{name}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(case / target.name, target)
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """best.pt of a small network whose masks are neither empty nor full."""
    torch.manual_seed(0)
    network = DRUNetV2(3, 1, (4, 8)).eval()
    with torch.no_grad():
        network.head.weight.mul_(100)
        network.head.bias.zero_()
    config = {"modalities": ("flair",), "regions": ("WT",), "context": 1, "size": 48, "widths": (4, 8)}
    content = {"model": network.state_dict(), "config": config, "thresholds": [0.5], "data_kind": "phantom"}
    save_checkpoint(tmp_path / "run" / "best.pt", content)
    return tmp_path / "run" / "best.pt"


@pytest.fixture
def segment(checkpoint: Path) -> Callable[..., pd.DataFrame]:
    """Function (output, *inputs, settings) that runs the command and returns volumes.csv."""

    def run(output: Path, *inputs: Path, code: int = 0, **settings: object) -> pd.DataFrame:
        config = InferenceConfig(
            input=tuple(map(str, inputs)), checkpoint=str(checkpoint), output=str(output), device="cpu"
        )
        config = dataclasses.replace(config, **settings)
        if code:
            with pytest.raises(SystemExit) as ended:
                main(config)
            assert ended.value.code == code
        else:
            main(config)
        return pd.read_csv(output / "volumes.csv", keep_default_na=False, na_values={"volume_ml": ""})

    return run


# ------------------------------------------------------------------------------------------------------------
# Nobody else's files
# ------------------------------------------------------------------------------------------------------------


def test_a_file_of_ours_is_replaced_and_no_other_unless_told(tmp_path, input_error):
    path = tmp_path / "mask.nii.gz"
    write_output(path, lambda target: target.write_text("one"))
    write_output(path, lambda target: target.write_text("two"))
    assert path.read_text() == "two"
    path.write_text("corrected by hand")
    with input_error(path, "--overwrite"):
        write_output(path, lambda target: target.write_text("three"))
    assert path.read_text() == "corrected by hand"
    write_output(path, lambda target: target.write_text("three"), overwrite=True)
    assert path.read_text() == "three"
    assert is_written_by_us(path)
    shutil.copy(path, tmp_path / "copy.nii.gz")
    assert not is_written_by_us(tmp_path / "copy.nii.gz")


def test_an_input_is_never_replaced_whatever_it_is_called(tmp_path, input_error):
    scan = tmp_path / "scan.nii.gz"
    write_output(scan, lambda target: target.write_text("scan"))  # even one that is ours
    (tmp_path / "link.nii.gz").symlink_to(scan)
    protect_inputs([scan])
    for path in (scan, tmp_path / "link.nii.gz", tmp_path / "x" / ".." / "scan.nii.gz"):
        with input_error(path, "never"):
            write_output(path, lambda target: target.write_text("mask"), overwrite=True)
    assert scan.read_text() == "scan"


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_into_the_case_folder_leaves_the_reference(cohort, segment, input_error, overwrite):
    case = sorted(cohort.iterdir())[0]
    before = hashes(cohort)
    with input_error(f"{case.name}_seg.nii.gz", "--output"):
        segment(case, case, overwrite=overwrite)
    assert hashes(cohort) == before


def test_a_mask_beside_a_case_without_one_is_no_reference_afterwards(cohort, segment):
    case = sorted(cohort.iterdir())[0]
    (case / f"{case.name}_seg.nii.gz").unlink()
    for _ in range(2):
        segment(case, case)
        assert (case / f"{case.name}_seg.nii.gz").is_file()
        (found,) = find_cases(CaseSource(str(case)))
        assert not found.mask


def test_predictions_below_the_data_are_no_cases(cohort, segment):
    before = hashes(cohort)
    for _ in range(2):
        table = segment(cohort / "predictions", cohort)
        assert table["case"].tolist() == sorted(path.name for path in cohort.iterdir() if path.name[0] == "B")
    assert {name: value for name, value in hashes(cohort).items() if name in before} == before


def test_a_file_of_others_in_the_output_folder_stays_and_nothing_is_computed(
    cohort, segment, tmp_path, input_error
):
    case = sorted(cohort.iterdir())[0]
    for name in ("volumes.csv", f"{case.name}_overlay.png", f"{case.name}_seg.nii.gz"):
        output = tmp_path / f"with_{name}"
        output.mkdir()
        (output / name).write_text("another's")
        with input_error(output / name, "--overwrite"):
            segment(output, case)
        assert [path.name for path in output.iterdir()] == [name]
        segment(output, case, overwrite=True)
        assert is_written_by_us(output / name)


def test_phantoms_replace_phantoms_and_nothing_else(tmp_path, input_error):
    config = make_phantom_v2.PhantomConfig(str(tmp_path), 1, 0, "internal", (16, 48, 48), (10.0, 5.0, 5.0))
    make_phantom_v2.main(config)
    make_phantom_v2.main(config)
    (path,) = tmp_path.glob("*/*_seg.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)
    before = path.read_bytes()
    with input_error(path, "--overwrite"):
        make_phantom_v2.main(config)
    assert path.read_bytes() == before
    make_phantom_v2.main(dataclasses.replace(config, overwrite=True))
    assert path.read_bytes() != before


def test_the_audit_writes_to_no_folder_of_others(cohort, input_error):
    before = hashes(cohort)
    config = final_evaluation_v2.EvaluationConfig(run="nowhere", output=str(cohort))
    with input_error(cohort, "--overwrite"):
        final_evaluation_v2.main(config)
    assert hashes(cohort) == before
    assert not (cohort / WRITTEN).exists()


# ------------------------------------------------------------------------------------------------------------
# Bad cases, cases done before
# ------------------------------------------------------------------------------------------------------------


def test_one_bad_file_ends_no_batch(cohort, segment, tmp_path, caplog):
    clean = segment(tmp_path / "clean", cohort)
    first, second, third = sorted(path.name for path in cohort.iterdir())
    scan = cohort / second / f"{second}_flair.nii.gz"
    scan.write_bytes(scan.read_bytes()[:3000])
    (cohort / "BraTS2021_99999").mkdir()  # a case of a mask alone
    shutil.copy(
        cohort / first / f"{first}_seg.nii.gz", cohort / "BraTS2021_99999" / "BraTS2021_99999_seg.nii.gz"
    )
    caplog.clear()
    table = segment(tmp_path / "out", cohort, code=1)
    assert table["case"].tolist() == [first, second, third, "BraTS2021_99999"]
    done = table[table["error"] == ""]
    assert done["case"].tolist() == [first, third]
    assert done["volume_ml"].tolist() == clean["volume_ml"].iloc[[0, 2]].tolist()
    errors = table.set_index("case")["error"]
    assert f"{second}_flair.nii.gz: truncated" in errors[second]
    assert "has no flair file" in errors["BraTS2021_99999"]
    for name in (second, "BraTS2021_99999"):
        assert f"{name} was not segmented: " in caplog.text
    for name in (first, third):
        masks = [tmp_path / folder / f"{name}_seg.nii.gz" for folder in ("clean", "out")]
        assert np.array_equal(*(np.asarray(nib.load(mask).dataobj) for mask in masks))


def test_a_mask_that_cannot_be_read_does_not_matter(cohort, segment, tmp_path):
    expected = segment(tmp_path / "clean", cohort)["volume_ml"].tolist()
    for mask in cohort.glob("*/*_seg.nii.gz"):
        mask.write_bytes(b"no mask")
    assert segment(tmp_path / "out", cohort)["volume_ml"].tolist() == expected


def test_cases_done_are_skipped_on_request(cohort, segment, tmp_path, caplog):
    caplog.set_level("INFO", "drunet")
    output = tmp_path / "out"
    first, second, third = sorted(path.name for path in cohort.iterdir())
    segment(output, cohort / first, cohort / second)
    masks = {name: output / f"{name}_seg.nii.gz" for name in (first, second, third)}
    times = {name: masks[name].stat().st_mtime_ns for name in (first, second)}
    masks[second].unlink()
    caplog.clear()
    table = segment(output, cohort, skip_done=True)
    assert "1 of 3 cases are done already" in caplog.text
    assert masks[first].stat().st_mtime_ns == times[first]
    assert masks[second].stat().st_mtime_ns != times[second]
    whole = segment(tmp_path / "whole", cohort)
    assert table.drop(columns="mask").equals(whole.drop(columns="mask"))


def test_cases_are_not_done_for_other_settings_maps_or_scans(cohort, segment, tmp_path):
    output = tmp_path / "out"
    first = sorted(path.name for path in cohort.iterdir())[0]
    scan, mask = cohort / first / f"{first}_flair.nii.gz", output / f"{first}_seg.nii.gz"
    segment(output, cohort / first)

    def is_done_again(**settings: object) -> bool:
        before = mask.stat().st_mtime_ns
        segment(output, cohort / first, skip_done=True, **settings)
        return mask.stat().st_mtime_ns != before

    assert not is_done_again()
    assert is_done_again(threshold=0.9)
    assert not is_done_again(threshold=0.9)
    assert is_done_again(threshold=0.9, tta=False)
    assert is_done_again(threshold=0.9, tta=False, probabilities=True)
    assert not is_done_again(threshold=0.9, tta=False, probabilities=True)
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), scan)
    assert is_done_again(threshold=0.9, tta=False, probabilities=True)


# ------------------------------------------------------------------------------------------------------------
# last.pt
# ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_thresholds_takes_one_half_and_says_so(
    checkpoint, segment, cohort, tmp_path, caplog
):
    caplog.set_level("INFO", "drunet")
    expected = segment(tmp_path / "best", cohort)["volume_ml"].tolist()  # its threshold is 0.5
    content = torch.load(checkpoint, weights_only=True)
    del content["thresholds"]
    last = checkpoint.with_name("last.pt")
    save_checkpoint(last, content)
    model = load_model(last, CPU)
    assert model.thresholds == (0.5,)
    assert "has no thresholds and no post-processing" in caplog.text
    found = segment(tmp_path / "last", cohort, checkpoint=str(last))
    assert found["volume_ml"].tolist() == expected


# ------------------------------------------------------------------------------------------------------------
# Nothing that is no number
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(checkpoint: Path) -> Path:
    """best.pt whose network gives NaN, as versions before wrote it where training went wrong."""
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["head.bias"].fill_(torch.nan)
    content |= {"format": "drunet-v2/1", "weights_sha256": weights_sha256(content["model"])}
    torch.save(content, checkpoint)
    return checkpoint


@pytest.mark.usefixtures("broken")
def test_a_network_that_gives_nan_makes_no_mask_and_no_volume(cohort, segment, tmp_path):
    for settings in ({}, {"tta": False}, {"probabilities": True}):
        table = segment(tmp_path / "out", cohort, code=1, **settings)
        assert len(table) == 3
        assert table["volume_ml"].isna().all()
        assert table["error"].str.contains("probabilities that are not finite").all()
        assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_whatever_predicts_refuses_what_is_not_finite(broken, input_error):
    model, volume = load_model(broken, CPU, amp=False), np.zeros((1, 3, 48, 48), np.float32)
    for predict in (predict_volume, predict_with_spread, predict_views):
        with input_error("the network", "not finite", "slices 0 to 2"):
            predict(model, volume)


@pytest.mark.parametrize(
    "thresholds", [[np.nan], [5], [-1], [np.inf], [True], ["0.5"], [None], [], [0.5, 0.5], 0.5, None, {}]
)
@pytest.mark.parametrize("is_onnx", [False, True], ids=["checkpoint", "ONNX"])
def test_thresholds_that_are_none_are_refused(checkpoint, thresholds, is_onnx, input_error, monkeypatch):
    content = torch.load(checkpoint, weights_only=True) | {"thresholds": thresholds}
    save_checkpoint(checkpoint, content)
    if is_onnx:
        monkeypatch.setattr(inference_v2, "load_onnx", lambda *_: (torch.nn.Identity(), content))
        checkpoint = checkpoint.with_suffix(".onnx")
    with input_error(checkpoint, "thresholds"):
        load_model(checkpoint, CPU)


@pytest.mark.parametrize("threshold", ["nan", "inf", "5", "-1", "-0.001", "1.001"])
def test_a_threshold_typed_that_is_none_is_refused(threshold, input_error):
    with input_error("--threshold"):
        parse(InferenceConfig, arguments=["--threshold", threshold])


SOUND = {"min_component_mm3": 10.0, "fill_holes": True, "min_total_mm3": 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"WT": SOUND | {"min_component_mm3": np.nan}},
        {"WT": SOUND | {"min_total_mm3": -1.0}},
        {"WT": SOUND | {"min_total_mm3": np.inf}},
        {"WT": SOUND | {"fill_holes": "no"}},
        {"WT": {"fill_holes": True}},
        {"XX": SOUND},
        {"TC": SOUND},
        {"WT": 3},
        [1],
    ],
)
def test_post_processing_that_training_does_not_choose_is_refused(checkpoint, settings, input_error):
    content = torch.load(checkpoint, weights_only=True)
    save_checkpoint(checkpoint, content | {"postprocessing": {"settings": {"WT": SOUND}}})
    load_model(checkpoint, CPU)
    save_checkpoint(checkpoint, content | {"postprocessing": {"settings": settings}})
    with input_error(checkpoint, "post"):
        load_model(checkpoint, CPU)


# ------------------------------------------------------------------------------------------------------------
# Warnings
# ------------------------------------------------------------------------------------------------------------


def test_blank_and_empty_results_stand_in_the_table_and_the_log(cohort, segment, tmp_path, caplog):
    first, second, _ = sorted(path.name for path in cohort.iterdir())
    scan = cohort / first / f"{first}_flair.nii.gz"
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.int16), image.affine), scan)
    table = segment(tmp_path / "out", cohort / first, cohort / second, code=1)
    assert table["volume_ml"].isna().tolist() == [True, False]  # no "0.0 ml" of what holds no brain
    assert table["error"][0].startswith(f"{scan}: its flair is constant, 7 everywhere")
    assert f"{first} was not segmented" in caplog.text
    table = segment(tmp_path / "none", cohort / second, threshold=1.0)
    assert table["warnings"].tolist() == ["no WT found"]
    assert table["volume_ml"].tolist() == [0]


def test_volumes_far_outside_training_are_named_by_hand():
    output = Output(Path("x"), ("WT", "TC"), usual_ml={"WT": (10.0, 100.0)})
    for volume_ml in (5.0, 60.0, 150.0):
        assert not warn_of_volume(output, "WT", volume_ml)
    for volume_ml in (4.99, 150.1):
        (warning,) = warn_of_volume(output, "WT", volume_ml)
        assert "outside training's 10 to 100 ml" in warning
    assert warn_of_volume(output, "WT", 0.0) == ["no WT found"]
    assert not warn_of_volume(output, "TC", 999.0)  # an old checkpoint, or a region training never saw
    assert not warn_of_volume(dataclasses.replace(output, usual_ml=None), "WT", 999.0)


def test_the_range_in_the_checkpoint_reaches_the_table(checkpoint, segment, cohort, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    save_checkpoint(checkpoint, content | {"reference_ml": {"WT": [0.001, 0.002]}})
    table = segment(tmp_path / "out", cohort)
    assert (table["volume_ml"] > 1).all()
    assert table["warnings"].str.contains("far outside training's 0.001 to 0.002 ml").all()


def test_odd_intensities_are_named():
    ramp, flat = np.arange(8.0).reshape(2, 2, 2), np.ones((2, 2, 2))
    assert warn_of_intensities(np.stack([ramp, flat]), ("flair", "t1")) == ["t1 is blank, 1 everywhere"]


# ------------------------------------------------------------------------------------------------------------
# Probabilities
# ------------------------------------------------------------------------------------------------------------


class Ramp(nn.Module):
    """Logits: the slab's middle slice plus a fixed ramp along the width."""

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits."""
        return slab[:, 1:2] + torch.linspace(-2, 2, slab.shape[-1])


def ramp_model(size: int) -> TrainedModel:
    return TrainedModel(Ramp(), ("flair",), ("WT",), 1, size, (0.5,), CPU, None, {})


def test_mean_and_spread_of_three_views_by_hand():
    volume = np.random.default_rng(0).uniform(-3, 3, (1, 4, 16, 16)).astype(np.float32)
    ramp = np.linspace(-2, 2, 16)
    there, mirrored = (1 / (1 + np.exp(-(volume[0] + sign * ramp).astype(np.float64))) for sign in (1, -1))
    mean, spread = predict_with_spread(ramp_model(16), volume)
    np.testing.assert_allclose(mean[0], (2 * there + mirrored) / 3, atol=1e-6)
    # of (a, a, b): mean square distance 2/9 (a - b)^2
    np.testing.assert_allclose(spread[0], np.sqrt(2) / 3 * np.abs(there - mirrored), atol=1e-6)
    assert (mean == predict_volume(ramp_model(16), volume)).all()


@pytest.mark.parametrize("turn", [np.diag([-1.0, -1, 1, 1]), np.diag([1.0, 1, -1, 1])])
def test_maps_lie_where_the_scan_lies(turn, write_nifti, tmp_path):
    rng = np.random.default_rng(1)
    affine = turn @ np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (5, -7, 11)
    scan = write_nifti(
        tmp_path / "c" / "c_flair.nii.gz", rng.uniform(1, 9, (20, 16, 4)).astype(np.float32), affine
    )
    (case,) = find_cases(CaseSource(str(scan.parent)))
    config = InferenceConfig(output=str(tmp_path / "out"), probabilities=True)
    (rows,) = segment_cases(config, ramp_model(32), [case])
    probability, spread = (
        nib.load(tmp_path / "out" / f"c_WT_{kind}.nii.gz") for kind in ("probability", "spread")
    )
    mask = nib.load(rows[0]["mask"])
    for image in (probability, spread):
        assert image.get_data_dtype() == np.float32
        assert np.allclose(image.affine, affine)
        assert image.shape == (20, 16, 4)
    voxels = np.asarray(mask.dataobj) > 0
    assert 0 < voxels.sum() < voxels.size
    assert (voxels == (probability.get_fdata() >= 0.5)).all()
    assert rows[0]["mean_spread"] == pytest.approx(spread.get_fdata()[voxels].mean(), abs=1e-4)
    plain = InferenceConfig(output=str(tmp_path / "plain"))
    (without,) = segment_cases(plain, ramp_model(32), [case])
    assert (np.asarray(nib.load(without[0]["mask"]).dataobj) > 0).tolist() == voxels.tolist()
    assert not list((tmp_path / "plain").glob("*_WT_*"))


def test_maps_of_slices_are_stacked_at_one_millimetre(write_slices, tmp_path):
    rng = np.random.default_rng(2)
    slices = {z: rng.integers(1, 255, (12, 10), np.uint8) for z in (1, 2, 3)}
    write_slices(tmp_path / "s", "p_1", slices)
    (case,) = find_cases(CaseSource(str(tmp_path / "s")))
    config = InferenceConfig(output=str(tmp_path / "out"), probabilities=True, tta=False)
    segment_cases_rows = list(segment_cases(config, ramp_model(16), [case]))
    assert "mean_spread" not in segment_cases_rows[0][0]
    image = nib.load(tmp_path / "out" / "p_1_WT_probability.nii.gz")
    assert image.shape == (10, 12, 3)
    assert np.allclose(image.affine, np.diag([-1, -1, 1, 1]))
    assert not (tmp_path / "out" / "p_1_WT_spread.nii.gz").exists()


# ------------------------------------------------------------------------------------------------------------
# A machine that runs out
# ------------------------------------------------------------------------------------------------------------

TRAIN, SEGMENT = {"workers", "batch_size", "checkpointing"}, {"batch_size"}


@pytest.mark.parametrize(
    ("error", "flags", "remedy"),
    [
        (RuntimeError("unable to write to file </torch_12_3_0>: No space left (28)"), TRAIN, "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), TRAIN, "--shm-size"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), TRAIN, "--workers 0"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), TRAIN, "--accumulate"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), SEGMENT, "--batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), SEGMENT, "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), SEGMENT, "--batch-size"),
        (MemoryError(), TRAIN, "--workers 0"),
    ],
)  # fmt: skip
def test_what_ran_out_ends_in_a_sentence_with_a_flag_of_the_command(error, flags, remedy):
    explained = explain_exhausted(error, flags)
    assert remedy in str(explained)
    assert "\n" not in str(explained)
    if "workers" not in flags:
        assert "--workers" not in str(explained)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(28, "No space left"), KeyError(1)]
)
def test_other_errors_stay_what_they_are(error):
    assert explain_exhausted(error, TRAIN) is None


class Deadly(Dataset):
    """Kills the worker that reads it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX alone")
def test_a_worker_that_is_killed_is_explained():
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Deadly(), num_workers=1)))
    assert "--workers 0" in str(explain_exhausted(caught.value, TRAIN))


def test_labels_are_not_read_where_they_are_not_wanted(cohort):
    case = find_cases(CaseSource(str(cohort)))[0]
    case.mask[0].write_bytes(b"no mask")
    loaded = load_case(case, with_labels=False)
    assert isinstance(loaded, LoadedCase)
    assert loaded.labels is None
    with pytest.raises(InputError):
        load_case(case)
