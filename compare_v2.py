"""Two audited runs against each other, case by case: is one better, and by how much.

    python final_evaluation_v2.py --compare results/RUN_A results/RUN_B

Only cases that both runs audited as test cases, and that neither of them had seen, are compared, so each
case is its own control.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from audit_plots_v2 import plot_comparison
from statistics_v2 import compare_paired
from utils_v2 import InputError, command_line, file_sha256, load_checkpoint, write_json

TEST_COHORTS = ("internal", "external")  # validation chose the threshold; external_unseen is part of external
COMPARED = ("dice", "hd95_mm", "nsd_1mm", "lesion_dice", "lesion_hd95_mm")
KEYS = ["cohort", "case", "patient", "region", "mode"]


def read_rows(run: Path) -> pd.DataFrame:
    """Return the test rows of a run's metrics_per_case.csv; InputError where it has not been audited."""
    path = run / "evaluation" / "metrics_per_case.csv"
    if not path.is_file():
        raise InputError(f"{path}: not there; audit the run first: final_evaluation_v2.py --run {run}")
    rows = pd.read_csv(path, dtype={"case": str, "patient": str})
    if missing := [name for name in (*KEYS, *COMPARED, "seen_in_training") if name not in rows]:
        raise InputError(f"{path}: no column {missing[0]}; audit {run} again with this version.")
    # a seen case of an external cohort is reported by the audit, and compared by nobody
    rows = rows[(rows["cohort"] != "external") | ~rows["seen_in_training"].astype(bool)]
    return rows[rows["cohort"].isin(TEST_COHORTS) & rows["mode"].isin(("plain", "tta"))]


def refuse_leak(runs: Sequence[Path], rows: Sequence[pd.DataFrame]) -> None:
    """Raise InputError where a test case or test patient of one run was in the other's training."""
    for tested, table, other in zip(runs, rows, runs[::-1], strict=True):
        seen = load_checkpoint(other / "best.pt")["seen"]  # by training and validation
        for column, name in enumerate(("case", "patient")):
            known = {str(entry[column]) for entry in seen}
            if leaked := sorted(set(table[name]) & known):
                raise InputError(
                    f"--compare: {name} {leaked[0]} is tested by {tested} and was in training or validation "
                    f"of {other} ({len(leaked)} such); train both on one split, with --split."
                )


def pair_rows(runs: Sequence[Path], rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows both runs have, columns of the first ending in _a, of the second in _b.

    Raises InputError where there are none, where a case was seen in training, or where the references
    differ, which means that it is not the same case or not the same mask.
    """
    paired = rows[0].merge(rows[1], on=KEYS, suffixes=("_a", "_b"))
    if paired.empty:
        raise InputError(f"--compare: {runs[0]} and {runs[1]} audited no common test case; audit them alike.")
    seen = paired[paired["seen_in_training_a"] | paired["seen_in_training_b"]]
    if len(seen):
        raise InputError(
            f"--compare: case {seen.iloc[0]['case']} was seen in training (audited with --allow-seen); audit "
            f"both runs without it."
        )
    other = paired[abs(paired["reference_ml_a"] - paired["reference_ml_b"]) > 1e-6]
    if len(other):
        raise InputError(
            f"--compare: the {other.iloc[0]['region']} reference of case {other.iloc[0]['case']} is not the "
            f"same in both audits; audit both runs on the same data."
        )
    return paired


def compare_rows(paired: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return {cohort: {region: {mode: {metric: means and paired difference A - B}, n_cases, n_patients}}}."""
    found: dict[str, Any] = {}
    for (cohort, region), chosen in paired.groupby(["cohort", "region"], sort=False):
        entry: dict[str, Any] = {
            "n_cases": chosen["case"].nunique(),
            "n_patients": chosen["patient"].nunique(),
        }
        for mode, part in chosen.groupby("mode", sort=False):
            patients = part["patient"].tolist()
            entry[mode] = {
                metric: {
                    "mean_a": float(part[f"{metric}_a"].mean()),
                    "mean_b": float(part[f"{metric}_b"].mean()),
                    "difference": compare_paired(part[f"{metric}_a"], part[f"{metric}_b"], patients, seed),
                }
                for metric in COMPARED
            }
        found.setdefault(cohort, {})[region] = entry
    return found


def describe_comparison(cohorts: dict[str, Any]) -> list[str]:
    """Return one line per cohort, region and metric, with TTA."""
    lines = []
    for cohort, regions in cohorts.items():
        for region, entry in regions.items():
            for metric, part in entry["tta"].items():
                difference = part["difference"]
                interval = "none (one patient)"
                if difference["ci95"]:
                    interval = "{:+.4f} to {:+.4f}".format(*difference["ci95"])
                lines.append(
                    f"{cohort} {region} {metric}: A {part['mean_a']:.4f}, B {part['mean_b']:.4f}, A - B "
                    f"{difference['mean']:+.4f} (95 % CI {interval}, sign-flip p "
                    f"{difference['p_sign_flip']:.3g}, {entry['n_cases']} cases of {entry['n_patients']} "
                    f"patients)"
                )
    return lines


def compare_runs(runs: Sequence[str], output: str | None, seed: int) -> None:
    """Compare two audited runs over their common test cases; print, write comparison.json and .png.

    `output` is the folder to write to, None for comparison_A_B beside the first run.
    """
    if len(runs) != 2:
        raise InputError(f"--compare takes two run folders, not {len(runs)}.")
    first, second = folders = [Path(run) for run in runs]
    if first.resolve() == second.resolve():
        raise InputError(f"--compare: {first} and {second} are one run; name another.")
    rows = [read_rows(folder) for folder in folders]
    refuse_leak(folders, rows)
    paired = pair_rows(folders, rows)
    summaries = [json.loads((folder / "evaluation" / "summary.json").read_text()) for folder in folders]
    is_phantom = any(summary["data_kind"] == "phantom" for summary in summaries)
    cases = [set(zip(table["cohort"], table["case"], strict=True)) for table in rows]
    cohorts = compare_rows(paired, seed)
    content = {
        "run_a": str(first),
        "run_b": str(second),
        "data_kind": "phantom" if is_phantom else "real",
        "averaged_over": "per case, then the mean over the cases both runs audited; difference is A - B; "
        "ci95 by bootstrap over patients; p by flipping the sign of each patient's differences",
        "n_cases_only_a": len(cases[0] - cases[1]),
        "n_cases_only_b": len(cases[1] - cases[0]),
        "cohorts": cohorts,
        "metrics_sha256": [file_sha256(f / "evaluation" / "metrics_per_case.csv") for f in folders],
        "command": command_line(),
    }
    folder = Path(output) if output else first.parent / f"comparison_{first.name}_{second.name}"
    write_json(folder / "comparison.json", content)
    note = " (synthetic phantoms, not a BraTS result)" if is_phantom else ""
    plot_comparison(folder / "comparison.png", paired, cohorts, (first.name, second.name), note)
    print(f"A {first}\nB {second}")
    print(f"audited by A alone: {content['n_cases_only_a']}, by B alone: {content['n_cases_only_b']} cases")
    if is_phantom:
        print("These are synthetic phantoms, not a BraTS result.")
    print("\n".join(describe_comparison(cohorts)))
    print(f"comparison.json and comparison.png are in {folder}")
