"""The audit of a run of folds: what the folds' audits come to together, and how that is to be read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from audit.postprocess import describe_postprocessing
from cohort.cache import PreparedCase
from cohort.split import SPLIT_PARTS
from runtime.files import file_sha256

Audit = TypeVar("Audit", bound=tuple)  # of a cohort: rows, counts, bins, kept
COHORTS = ("validation", "internal", "external")  # in the order of the output


def describe_fold(number: int, model: Any, checkpoint: Path, split: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the summary says of a fold; `model` is the network of its checkpoint."""
    return {
        "fold": number,
        "n_cases": {part: len(split[part]) for part in SPLIT_PARTS},
        "threshold": dict(zip(model.regions, model.thresholds, strict=True)),
        "postprocessing": model.checkpoint.get("postprocessing"),
        "checkpoint_sha256": file_sha256(checkpoint),
        "weights_sha256": model.checkpoint["weights_sha256"],
        "split_sha256": split["sha256"],
    }


def join_cohorts(parts: Sequence[Mapping[str, Audit]]) -> dict[str, Audit]:
    """Return the audit of each cohort over all folds; `parts` are in the order of the folds."""
    joined: dict[str, Audit] = {}
    for cohort in COHORTS:
        audits = [part[cohort] for part in parts if cohort in part]
        if not audits:
            continue
        joined[cohort] = audits[0]._replace(
            rows=join_rows([audit.rows for audit in audits]),
            counts={mode: sum(audit.counts[mode] for audit in audits) for mode in audits[0].counts},
            bins={mode: sum(audit.bins[mode] for audit in audits) for mode in audits[0].bins},
            kept={case: prediction for audit in audits for case, prediction in audit.kept.items()},
        )
    return joined


def join_cases(parts: Sequence[Mapping[str, Sequence[PreparedCase]]]) -> dict[str, list[PreparedCase]]:
    """Return the cases of each cohort over all folds, each once."""
    joined: dict[str, dict[str, PreparedCase]] = {}
    for part in parts:
        for cohort, cases in part.items():
            joined.setdefault(cohort, {}).update((case.case_id, case) for case in cases)
    return {cohort: list(by_id.values()) for cohort, by_id in joined.items()}


def join_rows(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of one cohort over all folds, each case in the same modes.

    A fold without post-processing has no rows of masks before it. Where another fold has, these are its masks
    as they are.
    """
    if not any(table["mode"].str.endswith("_raw").any() for table in tables):
        return pd.concat(tables, ignore_index=True)
    filled = []
    for table in tables:
        filled.append(table)
        if not table["mode"].str.endswith("_raw").any():
            filled.append(table.assign(mode=table["mode"] + "_raw", uncertainty=float("nan")))
    return pd.concat(filled, ignore_index=True)


def join_seen(parts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the counts of `seen.count_seen` over all folds."""
    joined: dict[str, dict[str, int]] = {}
    for cohort in COHORTS:
        for counts in (part[cohort] for part in parts if cohort in part):
            total = joined.setdefault(cohort, dict.fromkeys(counts, 0))
            joined[cohort] = {name: total[name] + count for name, count in counts.items()}
    return joined


def join_leakage(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of leakage.csv over all folds."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def add_dice(folds: Sequence[dict[str, Any]], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what the summary says of each fold, with its mean Dice per case: {region: {mode: mean}}."""
    internal = rows[(rows["cohort"] == "internal") & rows["mode"].isin(("plain", "tta"))]
    means = internal.groupby(["fold", "region", "mode"], sort=False)["dice"].mean()
    described = []
    for fold in folds:
        dice: dict[str, dict[str, float]] = {}
        for (region, mode), mean in means[fold["fold"]].items():
            dice.setdefault(region, {})[mode] = float(mean)
        described.append({**fold, "internal_dice": dice})
    return described


def describe_average(rows: pd.DataFrame, folds: int) -> str:
    """Return by which network each cohort is predicted, and how often a case counts."""
    validated = rows[rows["cohort"] == "validation"].groupby("case")["fold"].nunique()
    words = (
        f"out of fold: each internal case once, by the one of {folds} networks that has not seen the "
        "patient, with the threshold and post-processing of that fold; validation: each case once per fold "
        f"that validates on it ({len(validated)} cases, {(validated > 1).sum()} of them in several folds)"
    )
    if "external" in set(rows["cohort"]):
        words += (
            f"; external: the mean probability of the {folds} networks, with the mean of their thresholds "
            "and the median of their post-processing"
        )
    return words


def tabulate_folds(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row per fold and region, of the cases it tests; empty for a single run."""
    rows = [
        {
            "fold": str(fold["fold"]),
            "region": region,
            "train / validation / test": " / ".join(
                str(fold["n_cases"][part]) for part in ("train", "validation", "test")
            ),
            "Dice per case, TTA": f"{modes['tta']:.3f}",
            "plain": f"{modes['plain']:.3f}",
            "threshold": f"{fold['threshold'][region]:.2f}",
            "post-processing": describe_postprocessing((fold["postprocessing"] or {}).get("settings")),
        }
        for fold in summary.get("folds") or ()
        for region, modes in fold["internal_dice"].items()
    ]
    return pd.DataFrame(rows)
