"""Two audited runs against each other, case by case: is one better, and by how much.

    python final_evaluation_v2.py --compare results/RUN_A results/RUN_B

Only cases that both runs audited as test cases, and that neither of them had seen, are compared, so each
case is its own control. In place of a run there may be the scores of another tool's masks (--predictions):
they are compared with the other's masks in each of its modes. What that tool has seen is not known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from audit.comparison_page import name_modes, write_comparison_page
from audit.kinds import KIND_WORDS, kind_of, note_kind
from audit.pages import attempt, write_index
from audit.plots import plot_comparison
from audit.results import read_summary
from audit.statistics import compare_paired, format_spread
from cohort.folds import is_run_of_folds, list_checkpoints
from cohort.phantom import PHANTOM_NOTE, join_kinds
from runtime.checkpoints import load_checkpoint
from runtime.command import command_line
from runtime.errors import InputError
from runtime.files import file_sha256, write_json
from runtime.log import log
from runtime.tables import read_columns

TEST_COHORTS = (
    "internal",
    "external",
    "predictions",
)  # validation chose the threshold; external_unseen is part of external
COMPARED = ("dice", "hd95_mm", "nsd_1mm", "lesion_dice", "lesion_hd95_mm")
KEYS = ["cohort", "case", "patient", "region", "mode"]


def read_rows(run: Path) -> pd.DataFrame:
    """Return the test rows of a run's metrics_per_case.csv; InputError where it has not been audited."""
    path = run / "evaluation" / "metrics_per_case.csv"
    if not path.is_file():
        raise InputError(path, "not there", f"audit the run first: final_evaluation_v2.py --run {run}")
    remedy = f"audit {run} again with this version"
    rows = read_columns(path, remedy, KEYS, (*COMPARED, "reference_ml"))
    if "seen_in_training" not in rows:
        raise InputError(path, "no column seen_in_training", remedy)
    rows["seen_in_training"] = rows["seen_in_training"].eq(True)  # empty where it is not known
    # a seen case of an external cohort is reported by the audit, and compared by nobody
    rows = rows[(rows["cohort"] != "external") | ~rows["seen_in_training"]]
    return rows[rows["cohort"].isin(TEST_COHORTS) & rows["mode"].isin(("plain", "tta"))]


def is_given(rows: pd.DataFrame) -> bool:
    """Return whether rows are of another tool's masks."""
    return bool((rows["cohort"] == "predictions").any())


def align_given(rows: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return both tables, that of another tool's masks under the cohorts and modes of the run beside it.

    Of these masks those cases stay that the run tested; they are the same in each of the run's modes. Tables
    of two runs, or of two tools, come back as they are.
    """
    aligned = list(rows)
    for index, (table, other) in enumerate(zip(rows, rows[::-1], strict=True)):
        if is_given(table) and not is_given(other):
            places = other[["cohort", "case", "patient", "mode"]].drop_duplicates()
            given = table.drop(columns=["cohort", "mode"])
            aligned[index] = given.merge(places, on=["case", "patient"])
    return aligned


def refuse_leak(runs: Sequence[Path], rows: Sequence[pd.DataFrame]) -> None:
    """Raise InputError where a test case or test patient of one run was in the other's training.

    Of another tool nothing is known; a folder without network is such a tool's.
    """
    for tested, table, other in zip(runs, rows, runs[::-1], strict=True):
        if find_scores(other):
            log.warning("what the tool that made the masks of %s was trained on is not known", other)
            continue
        for name, known in list_seen(other).items():
            if leaked := sorted(set(table[name]) & known):
                raise InputError(
                    "--compare",
                    f"{name} {leaked[0]} is tested by {tested} and was in training or validation of "
                    f"{other} ({len(leaked)} such)",
                    "train both on one split, with --split, or both with the same --folds",
                )


def list_seen(run: Path) -> dict[str, set[str]]:
    """Return the ids of the cases and patients that a run has trained or validated on.

    Those that a run of folds audited as internal are not among them: that fold had not seen them.
    """
    seen: dict[str, set[str]] = {"case": set(), "patient": set()}
    for path in list_checkpoints(run):
        for case, patient, *_ in load_checkpoint(path)["seen"]:
            seen["case"].add(str(case))
            seen["patient"].add(str(patient))
    if is_run_of_folds(run):
        rows = read_rows(run)
        for name, known in seen.items():
            known -= set(rows.loc[rows["cohort"] == "internal", name])
    return seen


def find_scores(run: Path) -> dict[str, Any] | None:
    """Return what the summary of scored masks says of them; None for the audit of a run."""
    return read_summary(run / "evaluation" / "summary.json").get("predictions")


def headline_of(entry: dict[str, Any]) -> str:
    """Return the mode of a comparison whose numbers come first."""
    return "tta" if "tta" in entry else "plain"


def pair_rows(runs: Sequence[Path], rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows both runs have, columns of the first ending in _a, of the second in _b.

    Raises InputError where there are none, where a case was seen in training, or where the references
    differ, which means that it is not the same case or not the same mask.
    """
    paired = rows[0].merge(rows[1], on=KEYS, suffixes=("_a", "_b"))
    if paired.empty:
        raise InputError(
            "--compare", f"{runs[0]} and {runs[1]} audited no common test case", "audit them alike"
        )
    seen = paired[paired["seen_in_training_a"] | paired["seen_in_training_b"]]
    if len(seen):
        raise InputError(
            "--compare",
            f"case {seen.iloc[0]['case']} was seen in training (audited with --allow-seen)",
            "audit both runs without it",
        )
    other = paired[abs(paired["reference_ml_a"] - paired["reference_ml_b"]) > 1e-6]
    if len(other):
        raise InputError(
            "--compare",
            f"the {other.iloc[0]['region']} reference of case {other.iloc[0]['case']} is not the same in "
            "both audits",
            "audit both runs on the same data",
        )
    return paired


def compare_rows(paired: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return {cohort: {region: {mode: {metric: means and paired difference A - B}, n_cases, n_patients}}}."""
    cohorts: dict[str, Any] = {}
    for (cohort, region), rows in paired.groupby(["cohort", "region"], sort=False):
        entry: dict[str, Any] = {
            "n_cases": rows["case"].nunique(),
            "n_patients": rows["patient"].nunique(),
        }
        for mode, of_mode in rows.groupby("mode", sort=False):
            patients = of_mode["patient"].tolist()
            entry[mode] = {}
            for metric in COMPARED:
                first, second = of_mode[f"{metric}_a"], of_mode[f"{metric}_b"]
                entry[mode][metric] = {
                    "mean_a": float(first.mean()),
                    "mean_b": float(second.mean()),
                    "difference": compare_paired(first, second, patients, seed),
                }
        cohorts.setdefault(cohort, {})[region] = entry
    return cohorts


def tabulate_comparison(cohorts: dict[str, Any]) -> pd.DataFrame:
    """Return formatted means and differences (TTA, where there is), a row per cohort, region, metric."""
    rows = []
    for cohort, regions in cohorts.items():
        for region, entry in regions.items():
            for metric, means in entry[headline_of(entry)].items():
                difference = means["difference"]
                rows.append(
                    {
                        "cohort": cohort,
                        "region": region,
                        "metric": metric,
                        "A": f"{means['mean_a']:.4f}",
                        "B": f"{means['mean_b']:.4f}",
                        "A - B": f"{difference['mean']:+.4f}",
                        "95 % CI": format_spread(difference, "{:+.4f}"),
                        "sign-flip p": f"{difference['p_sign_flip']:.3g}",
                        "cases / patients": f"{entry['n_cases']} / {entry['n_patients']}",
                    }
                )
    return pd.DataFrame(rows)


def count_alone(rows: pd.DataFrame, paired: pd.DataFrame) -> int:
    """Return how many cases of one table are not among those compared."""
    tested, common = (table[["cohort", "case"]].drop_duplicates() for table in (rows, paired))
    if is_given(rows):  # which are compared under the cohorts of the run beside them
        return int((~tested["case"].isin(common["case"])).sum())
    return len(set(tested.itertuples(index=False)) - set(common.itertuples(index=False)))


def summarise_comparison(
    runs: Sequence[Path], rows: Sequence[pd.DataFrame], paired: pd.DataFrame, seed: int
) -> dict[str, Any]:
    """Return what comparison.json holds: runs and rows of A and B as read, and the rows of both together."""
    summaries = [read_summary(run / "evaluation" / "summary.json") for run in runs]
    kinds = [kind_of(each, cohort) for each in summaries for cohort in paired["cohort"].unique()]
    return {
        "run_a": str(runs[0]),
        "run_b": str(runs[1]),
        "data_kind": join_kinds(kinds),
        "masks_as_given": {name: find_scores(run) is not None for name, run in zip("ab", runs, strict=True)},
        "averaged_over": "per case, then the mean over the cases both runs audited; difference is A - B; "
        "ci95 by bootstrap over patients; p by flipping the sign of each patient's differences",
        "n_cases_only_a": count_alone(rows[0], paired),
        "n_cases_only_b": count_alone(rows[1], paired),
        "cohorts": compare_rows(paired, seed),
        "metrics_sha256": [file_sha256(run / "evaluation" / "metrics_per_case.csv") for run in runs],
        "command": command_line(),
    }


def log_comparison(comparison: dict[str, Any]) -> None:
    """Log what comparison.json holds."""
    log.info("A %s\nB %s", comparison["run_a"], comparison["run_b"])
    alone = (comparison["n_cases_only_a"], comparison["n_cases_only_b"])
    log.info("not compared: %d cases of A, %d of B, which the other was not tested on or had seen", *alone)
    if comparison["data_kind"] != "real":
        words = PHANTOM_NOTE if comparison["data_kind"] == "phantom" else KIND_WORDS["mixed"]
        log.warning("These are %s.", words)
    table = tabulate_comparison(comparison["cohorts"])
    log.info("mean over cases, %s:\n%s", name_modes(comparison), table.to_string(index=False))


def compare_runs(runs: Sequence[str], output: str | None, seed: int) -> None:
    """Compare two audited runs over their common test cases; log, write page, numbers and plot.

    `output` is the folder to write to, None for comparison_A_B beside the first run.
    """
    if len(runs) != 2:
        raise InputError("--compare", f"takes two run folders, not {len(runs)}")
    first, second = folders = [Path(run) for run in runs]
    if first.resolve() == second.resolve():
        raise InputError("--compare", f"{first} and {second} are one run", "name another")
    rows = [read_rows(folder) for folder in folders]
    aligned = align_given(rows)
    refuse_leak(folders, aligned)
    paired = pair_rows(folders, aligned)
    comparison = summarise_comparison(folders, rows, paired, seed)
    folder = Path(output) if output else first.parent / f"comparison_{first.name}_{second.name}"
    write_json(folder / "comparison.json", comparison)
    note = f", {name_modes(comparison)}" + note_kind(comparison["data_kind"])
    plot_comparison(folder / "comparison.png", paired, comparison["cohorts"], (first.name, second.name), note)
    log_comparison(comparison)
    page, table = folder / "comparison.html", tabulate_comparison(comparison["cohorts"])
    attempt(page, lambda: write_comparison_page(page, comparison, paired, table))
    log.info("comparison.html, comparison.json and comparison.png are in %s", folder)
    write_index(first.parent)
