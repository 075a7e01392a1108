"""The commands as their user runs them: subprocesses at tiny size, on phantoms."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from cohort.preprocess import brain_mask
from runtime.checkpoints import load_checkpoint, save_checkpoint
from utils_v2 import choose_thresholds

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--size",
    "48",
    "--widths",
    "4",
    "8",
    "16",
    "--batch-size",
    "8",
    "--slabs-per-epoch",
    "32",
    "--workers",
    "0",
]
TINY += ["--learning-rate", "1e-2", "--device", "cpu"]


def run(script, *arguments, cwd, expect=0):
    """Run a command in `cwd` and return it, with stdout and stderr as text."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def complaint(done):
    """Return the one sentence a command ended with; progress bars may stand before it on other lines."""
    assert "Traceback" not in done.stderr
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if "error:" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, phantom_cohort, external_cohort):
    """A folder with a run trained for two epochs and audited with an external cohort."""
    folder = tmp_path_factory.mktemp("trained")
    run("train_drunet_v2.py", "--data-dir", phantom_cohort, "--run", "tiny", "--epochs", 2, *TINY, cwd=folder)
    run("final_evaluation_v2.py", "--external-dir", external_cohort, "--device", "cpu", cwd=folder)
    return folder


def test_training_leaves_a_run_folder_that_explains_itself(trained, phantom_cohort):
    folder = trained / "results" / "tiny"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "split.json", "log.csv", "batch.png", "curves.png", "best.pt", "last.pt",
        "last_before.pt", "train.log", "evaluation", "balance.csv", "index.html", "MODEL_CARD.md",
        ".drunet_written",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["widths"] == [4, 8, 16]
    assert config["data_kind"] == "phantom"
    assert config["split_patients"] == {"train": 6, "validation": 1, "test": 1}
    assert config["command"].startswith("python train_drunet_v2.py --data-dir")
    split = json.loads((folder / "split.json").read_text())
    assert sorted(split["train"] + split["validation"] + split["test"]) == sorted(
        path.name for path in phantom_cohort.iterdir() if path.is_dir()
    )
    log = pd.read_csv(folder / "log.csv")
    assert log["epoch"].tolist() == [1, 2]
    checkpoint = load_checkpoint(folder / "best.pt")
    assert checkpoint["validation_dice"] == pytest.approx(log["validation_dice_WT"].max())
    assert {entry[0] for entry in checkpoint["seen"]} == set(split["train"] + split["validation"])


def test_training_and_the_audit_leave_pages_that_lead_to_one_another(trained):
    results = trained / "results"
    index = (results / "index.html").read_text()
    for link in ("tiny/index.html", "tiny/evaluation/report.html", "tiny/MODEL_CARD.md"):
        assert f'href="{link}"' in index
        assert (results / link).is_file()
    summary = json.loads((results / "tiny" / "evaluation" / "summary.json").read_text())
    shown = f"{summary['cohorts']['internal']['WT']['tta']['dice']['mean']:.3f}"
    page = (results / "tiny" / "index.html").read_text()
    for text in (index, page, (results / "tiny" / "MODEL_CARD.md").read_text()):
        assert shown in text
    report = (results / "tiny" / "evaluation" / "report.html").read_text()
    assert 'href="../index.html"' in report
    assert 'href="../MODEL_CARD.md"' in report
    assert page.count("data:image/png;base64,") == 2  # curves and first batch
    assert "% drawn" in page


def test_threshold_of_the_checkpoint_follows_from_the_dice_of_each_validation_case(trained):
    checkpoint = load_checkpoint(trained / "results" / "tiny" / "best.pt")
    sweep = checkpoint["threshold_sweep"]
    dice = np.array(sweep["validation_dice"])
    split = json.loads((trained / "results" / "tiny" / "split.json").read_text())
    assert dice.shape == (len(split["validation"]), 1, len(sweep["thresholds"]))
    assert dice[:, 0, sweep["thresholds"].index(0.5)].mean() == pytest.approx(checkpoint["validation_dice"])
    assert checkpoint["thresholds"] == choose_thresholds(dice)


def test_summary_follows_from_the_rows_per_case(trained, phantom_cohort):
    folder = trained / "results" / "tiny" / "evaluation"
    rows = pd.read_csv(folder / "metrics_per_case.csv")
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["cohorts"]) == {"validation", "internal", "external"}
    for cohort in summary["cohorts"]:
        for mode in ("plain", "tta"):
            chosen = rows[(rows["cohort"] == cohort) & (rows["mode"] == mode)]
            part = summary["cohorts"][cohort]["WT"][mode]
            assert part["n_cases"] == len(chosen)
            assert part["dice"]["mean"] == pytest.approx(chosen["dice"].mean())
            assert part["hd95_mm"]["median"] == pytest.approx(chosen["hd95_mm"].median())
            assert part["nsd_1mm"]["mean"] == pytest.approx(chosen["nsd_1mm"].mean())
            assert part["lesion_dice"]["mean"] == pytest.approx(chosen["lesion_dice"].mean())
            assert part["lesions_fn"] == chosen["lesions_fn"].sum()
            error = chosen["prediction_ml"] - chosen["reference_ml"]
            assert part["volume_error_ml"]["mean"] == pytest.approx(error.mean())
            tp, fp, fn = (chosen[name].sum() for name in ("tp", "fp", "fn"))
            assert part["dice_pooled"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
            if part["n_patients"] < 6:
                assert part["dice"]["ci95"] is None
                assert part["dice"]["range"] == [chosen["dice"].min(), chosen["dice"].max()]
            else:
                low, high = part["dice"]["ci95"]
                assert low <= part["dice"]["mean"] <= high
    checkpoint = load_checkpoint(trained / "results" / "tiny" / "best.pt")
    modes = 4 if checkpoint["postprocessing"]["settings"] else 2
    assert len(rows) == modes * (1 + 1 + 3)
    assert summary["data_kind"] == "phantom"
    table = summary["calibration"]["WT"]["tta"]
    (validation,) = json.loads((trained / "results" / "tiny" / "split.json").read_text())["validation"]
    flair = nib.load(phantom_cohort / validation / f"{validation}_flair.nii.gz").get_fdata(dtype=np.float32)
    assert table["n_voxels"] == sum(table["voxels"]) == brain_mask(flair.transpose(2, 1, 0)).sum()
    gaps = [
        n * abs(mean - share)
        for n, mean, share in zip(
            table["voxels"], table["mean_probability"], table["reference_share"], strict=True
        )
        if n
    ]
    assert table["ece"] == pytest.approx(sum(gaps) / table["n_voxels"])
    for key in ("threshold", "checkpoint_sha256", "split_sha256", "versions", "hardware", "command"):
        assert summary[key]


def test_dice_per_case_is_that_of_the_mask_the_inference_command_writes(trained, phantom_cohort):
    split = json.loads((trained / "results" / "tiny" / "split.json").read_text())
    case = split["test"][0]
    run(
        "inference_v2.py",
        "--input",
        phantom_cohort / case,
        "--output",
        "masks",
        "--device",
        "cpu",
        cwd=trained,
    )
    written = nib.load(trained / "masks" / f"{case}_seg.nii.gz")
    flair = nib.load(phantom_cohort / case / f"{case}_flair.nii.gz")
    assert np.array_equal(written.affine, flair.affine)
    assert written.shape == flair.shape
    assert written.header.get_zooms() == flair.header.get_zooms()
    assert written.get_data_dtype() == np.uint8
    prediction = np.asarray(written.dataobj) > 0
    reference = np.asarray(nib.load(phantom_cohort / case / f"{case}_seg.nii.gz").dataobj) > 0
    rows = pd.read_csv(trained / "results" / "tiny" / "evaluation" / "metrics_per_case.csv")
    row = rows[(rows["case"] == case) & (rows["mode"] == "tta")].iloc[0]
    assert row["dice"] == pytest.approx(
        2 * (prediction & reference).sum() / (prediction.sum() + reference.sum())
    )
    volumes = pd.read_csv(trained / "masks" / "volumes.csv")
    assert volumes["volume_ml"][0] == pytest.approx(prediction.sum() * 0.25, abs=1e-3)  # 10 x 5 x 5 mm voxels
    assert (trained / "masks" / f"{case}_overlay.png").stat().st_size > 5000


def test_postprocessing_of_the_checkpoint_reaches_audit_and_inference(trained, phantom_cohort):
    folder = trained / "results" / "tiny"
    emptied = trained / "emptied"
    emptied.mkdir()
    shutil.copy(folder / "split.json", emptied)
    setting = {"min_component_mm3": 0.0, "fill_holes": False, "min_total_mm3": 1e9}
    content = load_checkpoint(folder / "best.pt") | {"postprocessing": {"settings": {"WT": setting}}}
    content |= {"thresholds": [0.05]}  # a network of two epochs need not reach a half anywhere
    save_checkpoint(emptied / "best.pt", content)
    run("final_evaluation_v2.py", "--run", emptied, "--device", "cpu", cwd=trained)
    rows = pd.read_csv(emptied / "evaluation" / "metrics_per_case.csv")
    volumes = rows.groupby("mode")["prediction_ml"].sum()
    assert volumes["plain"] == volumes["tta"] == 0
    assert volumes["plain_raw"] > 0
    assert volumes["tta_raw"] > 0
    summary = json.loads((emptied / "evaluation" / "summary.json").read_text())
    part = summary["cohorts"]["internal"]["WT"]
    assert part["tta"]["n_empty_prediction"] == part["tta"]["n_cases"]
    gain = part["tta"]["dice"]["mean"] - part["tta_raw"]["dice"]["mean"]
    assert part["postprocessing_gain"]["mean"] == pytest.approx(gain)
    text = (emptied / "evaluation" / "report.html").read_text()
    assert "emptied below 1e+09 mm3" in text
    case = json.loads((folder / "split.json").read_text())["test"][0]
    arguments = ("--input", phantom_cohort / case, "--checkpoint", emptied / "best.pt", "--device", "cpu")
    for flags, is_empty in (((), True), (("--no-postprocess",), False)):
        run("inference_v2.py", *arguments, "--output", "cleaned", *flags, cwd=trained)
        assert (pd.read_csv(trained / "cleaned" / "volumes.csv")["volume_ml"][0] == 0) == is_empty


def test_report_needs_no_other_file_and_says_what_it_is(trained):
    text = (trained / "results" / "tiny" / "evaluation" / "report.html").read_text()
    assert "synthetic phantoms, not a BraTS result" in text
    assert "not for clinical use" in text
    assert (text.count("data:image/png;base64,"), text.count("<svg ")) == (2, 8)
    linked = set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text))
    assert linked <= {"../index.html", "../MODEL_CARD.md"}  # of the run, written after it


def test_resumed_run_equals_one_that_was_not_interrupted(tmp_path, phantom_cohort):
    settings = ("--data-dir", phantom_cohort, *TINY, "--ema", 0.9, "--drop-by", 9, "--patience", 0)
    run("train_drunet_v2.py", *settings, "--run", "whole", "--epochs", 3, cwd=tmp_path)
    run("train_drunet_v2.py", *settings, "--run", "parts", "--epochs", 1, cwd=tmp_path)
    run("train_drunet_v2.py", "--resume", "results/parts", "--epochs", 3, cwd=tmp_path)
    whole, parts = (load_checkpoint(tmp_path / "results" / name / "last.pt") for name in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 3
    for name in ("model", "network"):
        for key, value in whole[name].items():
            assert torch.equal(value, parts[name][key]), key
    logs = [pd.read_csv(tmp_path / "results" / name / "log.csv") for name in ("whole", "parts")]
    for column in ("epoch", "learning_rate", "train_loss", "train_dice", "validation_dice_WT"):
        assert logs[0][column].tolist() == logs[1][column].tolist()


def test_resume_refuses_settings_of_another_network(trained):
    done = run("train_drunet_v2.py", "--resume", "results/tiny", "--widths", 8, 16, cwd=trained, expect=2)
    assert "--widths" in complaint(done)


def test_weights_that_do_not_fit_the_widths_are_refused(trained):
    folder = trained / "results" / "other"
    folder.mkdir()
    content = torch.load(trained / "results" / "tiny" / "best.pt", weights_only=True)
    content["config"]["widths"] = (8, 16, 32)
    save_checkpoint(folder / "wrong.pt", content)
    done = run(
        "inference_v2.py", "--checkpoint", folder / "wrong.pt", "--device", "cpu", cwd=trained, expect=2
    )
    assert "8-16-32" in complaint(done)


def test_clock_ends_a_run_cleanly_with_validation_checkpoint_and_plot(tmp_path, phantom_cohort):
    settings = ("--data-dir", phantom_cohort, *TINY, "--run", "short", "--max-minutes", 0.001, "--epochs", 50)
    run("train_drunet_v2.py", *settings, cwd=tmp_path)
    log = pd.read_csv(tmp_path / "results" / "short" / "log.csv")
    assert len(log) == 1
    for name in ("best.pt", "last.pt", "curves.png"):
        assert (tmp_path / "results" / "short" / name).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to a child there")
def test_ctrl_c_ends_with_one_sentence_and_leaves_a_run_to_resume(tmp_path, phantom_cohort):
    command = [sys.executable, str(ROOT / "train_drunet_v2.py"), "--data-dir", str(phantom_cohort)]
    command += ["--run", "stopped", "--epochs", "500", *TINY]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a suite in the background ignores it
    ) as process:
        last = tmp_path / "results" / "stopped" / "last.pt"
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "stopped by Ctrl-C" in stderr
    epoch = load_checkpoint(last)["epoch"]
    run("train_drunet_v2.py", "--resume", "results/stopped", "--epochs", epoch + 1, cwd=tmp_path)
    assert load_checkpoint(last)["epoch"] == epoch + 1


def drop_flair(case):
    (case / f"{case.name}_flair.nii.gz").unlink()


def cut_mask(case):
    path = case / f"{case.name}_seg.nii.gz"
    seg = nib.load(path)
    labels = np.asarray(seg.dataobj)[:, :, :-1]
    nib.save(nib.Nifti1Image(labels, seg.affine), path)


def add_label(case):
    path = case / f"{case.name}_seg.nii.gz"
    seg = nib.load(path)
    labels = np.asarray(seg.dataobj).copy()
    labels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(labels, seg.affine), path)


def truncate_flair(case):
    path = case / f"{case.name}_flair.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (drop_flair, "BraTS2021_"),
        (cut_mask, "_seg.nii.gz"),
        (add_label, "_seg.nii.gz"),
        (truncate_flair, "_flair.nii.gz"),
    ],
)
def test_bad_case_ends_in_one_sentence_that_names_it(tmp_path, phantom_cohort, spoil, culprit):
    for case in sorted(phantom_cohort.iterdir())[:3]:
        shutil.copytree(case, tmp_path / "bad" / case.name)
        spoil(tmp_path / "bad" / case.name)
    done = run("train_drunet_v2.py", "--data-dir", "bad", *TINY, "--epochs", 1, cwd=tmp_path, expect=2)
    assert culprit in complaint(done)


def test_folder_that_is_missing_or_empty_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        done = run("train_drunet_v2.py", "--data-dir", name, *TINY, cwd=tmp_path, expect=2)
        assert name in complaint(done)


def test_bad_flags_end_in_one_sentence_that_names_the_flag(trained, phantom_cohort):
    foreign = trained / "foreign.pt"
    torch.save({"state_dict": {}}, foreign)
    train = ("train_drunet_v2.py", "--data-dir", phantom_cohort, "--workers", 0)
    commands = {
        "--size": (*train, "--size", 50, "--widths", 4, 8, 16),
        "foreign.pt": ("inference_v2.py", "--checkpoint", foreign),
        "--run": (*train, "--run", "tiny"),
        "--regions": (*train, "--regions", "XX", "--widths", 4, 8),
        "results": ("final_evaluation_v2.py", "--run", "results/none"),
    }
    if not torch.cuda.is_available():
        commands["--device"] = (*train, "--device", "cuda")
    for culprit, command in commands.items():
        assert culprit in complaint(run(*command, cwd=trained, expect=2))


def test_every_measurement_reads_its_command_line():
    # by its text, as some import packages that are not needed otherwise
    for script in (ROOT / "benchmarks").glob("*.py"):
        _, entry, last = script.read_text().partition('if __name__ == "__main__":')
        assert not entry or "run_command(" in last or "parse(" in last, script.name


def test_every_command_has_complete_help():
    for script in ROOT.glob("*_v2.py"):
        if 'if __name__ == "__main__"' not in script.read_text():
            continue
        text = run(script.name, "--help", cwd=ROOT).stdout
        assert "usage:" in text
        assert "(default: " in text
