"""`final_evaluation_v2.py --compare` as its user runs it, on run folders with made-up audits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from audit.compare import compare_runs
from runtime.checkpoints import save_checkpoint
from runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
CASES = [(f"case{i}", f"patient{i // 2}") for i in range(8)]  # two scans a patient


def write_run(folder, dice, cases=CASES, seen=(("old", "someone", "sha"),), reference_ml=10.0, flagged=()):
    """Write a run folder with an audit of `cases` whose WT Dice is `dice`; plain is 0.1 below TTA."""
    rows = [
        {"cohort": cohort, "case": case, "patient": patient, "region": "WT", "mode": mode}
        | {"seen_in_training": case in flagged, "reference_ml": reference_ml}
        | {"dice": value - 0.1 * (mode == "plain"), "hd95_mm": 5.0, "nsd_1mm": value}
        | {"lesion_dice": value, "lesion_hd95_mm": 5.0}
        for (case, patient), value in zip(cases, dice, strict=True)
        for cohort in ("internal", "validation")
        for mode in ("plain", "tta", "tta_raw")
    ]
    (folder / "evaluation").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "evaluation" / "metrics_per_case.csv", index=False)
    write_json(folder / "evaluation" / "summary.json", {"data_kind": "phantom"})
    save_checkpoint(folder / "best.pt", {"model": {"w": torch.zeros(1)}, "seen": [list(s) for s in seen]})
    return folder


def test_comparison_is_paired_over_common_cases_and_writes_numbers_and_picture(tmp_path):
    first = [0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3, 0.2]
    gains = [0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04]
    write_run(tmp_path / "b", first)
    write_run(
        tmp_path / "a",
        [value + gain for value, gain in zip(first, gains, strict=True)] + [1.0],
        [*CASES, ("case9", "patient9")],
    )
    command = [sys.executable, str(ROOT / "final_evaluation_v2.py"), "--compare", "a", "b"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "comparison_a_b" / "comparison.json").read_text())
    assert (content["n_cases_only_a"], content["n_cases_only_b"]) == (1, 0)
    assert content["data_kind"] == "phantom"
    assert set(content["cohorts"]) == {"internal"}
    entry = content["cohorts"]["internal"]["WT"]
    assert (entry["n_cases"], entry["n_patients"]) == (8, 4)
    found = entry["tta"]["dice"]
    assert found["mean_a"] - found["mean_b"] == pytest.approx(0.025)
    assert found["difference"]["mean"] == pytest.approx(0.025)
    assert found["difference"]["ci95"] is None  # four patients
    assert found["difference"]["range"] == pytest.approx([0.01, 0.04])
    assert "range +0.0100 to +0.0400, n = 8" in done.stdout
    # four patients, all better: of 16 sign patterns two are as extreme. Over cases it would be 2 / 256
    assert found["difference"]["p_sign_flip"] == 2 / 16
    assert entry["plain"]["dice"]["difference"]["mean"] == pytest.approx(0.025)
    assert entry["tta"]["hd95_mm"]["difference"]["p_sign_flip"] == 1
    assert (tmp_path / "comparison_a_b" / "comparison.png").stat().st_size > 5000
    assert "synthetic phantoms, not a BraTS result" in done.stdout
    (line,) = [line.split() for line in done.stdout.splitlines() if line.split()[2:3] == ["dice"]]
    assert line[:6] == ["internal", "WT", "dice", "0.5750", "0.5500", "+0.0250"]


def test_cases_with_names_that_pandas_takes_for_nothing_are_compared(tmp_path):
    cases = [("NA", "nan"), ("None", "null"), ("007", "1e5")]
    for name in "ab":
        write_run(tmp_path / name, [0.5, 0.6, 0.7], cases)
    compare_runs([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"), 0)
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["cohorts"]["internal"]["WT"]["n_patients"] == 3


def test_comparison_the_other_way_round_changes_the_sign_alone(tmp_path):
    cases = [(case, case) for case, _ in CASES]
    write_run(tmp_path / "a", [0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3, 0.2], cases)
    write_run(tmp_path / "b", [0.6, 0.5, 0.9, 0.8, 0.9, 0.3, 0.3, 0.1], cases)
    found = []
    for runs in (("a", "b"), ("b", "a")):
        compare_runs([str(tmp_path / run) for run in runs], str(tmp_path / "out"), 0)
        content = json.loads((tmp_path / "out" / "comparison.json").read_text())
        found.append(content["cohorts"]["internal"]["WT"]["tta"]["dice"]["difference"])
    assert found[0]["mean"] == pytest.approx(-found[1]["mean"])
    assert found[0]["p_sign_flip"] == found[1]["p_sign_flip"]
    # the same draws of patients, mirrored
    assert found[0]["ci95"] == pytest.approx([-edge for edge in found[1]["ci95"][::-1]])


def test_a_test_case_in_the_others_training_is_refused(tmp_path, input_error):
    dice = [0.5] * 8
    write_run(tmp_path / "a", dice)
    write_run(tmp_path / "b", dice, seen=[("case3", "x", "sha")])
    for runs in (("a", "b"), ("b", "a")):
        with input_error("case3", "--split", tmp_path / "b"):
            compare_runs([str(tmp_path / run) for run in runs], None, 0)
    # another scan of a tested patient
    write_run(tmp_path / "c", dice, seen=[("case99", "patient1", "sha")])
    with input_error("patient1"):
        compare_runs([str(tmp_path / "a"), str(tmp_path / "c")], None, 0)


def test_what_cannot_be_compared_is_refused(tmp_path, input_error):
    dice = [0.5] * 8
    a = str(write_run(tmp_path / "a", dice))
    others = [(f"other{i}", f"q{i}") for i in range(8)]
    refused = {
        "no common test case": write_run(tmp_path / "others", dice, others),
        "case2": write_run(tmp_path / "flagged", dice, flagged=("case2",)),
        "reference": write_run(tmp_path / "mask", dice, reference_ml=11.0),
        "metrics_per_case.csv": tmp_path / "nowhere",
        "one run": tmp_path / "a",
    }
    for culprit, run in refused.items():
        with input_error(culprit):
            compare_runs([a, str(run)], None, 0)
    with input_error("--compare"):
        compare_runs([a], None, 0)
    old = tmp_path / "mask" / "evaluation" / "metrics_per_case.csv"
    pd.read_csv(old).drop(columns="nsd_1mm").to_csv(old, index=False)
    with input_error("nsd_1mm"):
        compare_runs([a, str(tmp_path / "mask")], None, 0)
