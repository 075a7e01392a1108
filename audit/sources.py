"""What an audit says of each cohort that a run was trained on, and of cases that lack modalities."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from audit.measure import summarise_all
from cohort.cache import PreparedCase
from cohort.several import list_cohorts


def add_origin(rows: pd.DataFrame, cohorts: Mapping[str, Sequence[PreparedCase]]) -> pd.DataFrame:
    """Return the per-case rows with the column "source", where the run's cases are of several cohorts.

    It is the cohort that a case is from. Where cases lack modalities there is a column "missing" too.
    """
    cases = [(name, case) for name, own in cohorts.items() for case in own]
    asked = pd.MultiIndex.from_frame(rows[["cohort", "case"]].replace("external_unseen", "external"))
    if len(list_cohorts([case for name, case in cases if name != "external"])) > 1:
        source_of = {(name, case.case_id): case.cohort for name, case in cases}
        rows = rows.assign(source=[source_of[key] for key in asked])
    if any(case.missing for _, case in cases):
        missing_of = {(name, case.case_id): " ".join(case.missing) for name, case in cases}
        rows = rows.assign(missing=[missing_of[key] for key in asked])
    return rows


def summarise_by_source(rows: pd.DataFrame, regions: Sequence[str], seed: int) -> dict[str, Any]:
    """Return {"by_source": {cohort: {source: {region: as in "cohorts"}}}} of validation and internal test.

    Empty where there is one source.
    """
    if "source" not in rows:
        return {}
    own = rows[rows["cohort"].isin(("validation", "internal"))]
    summary: dict[str, Any] = {}
    for (cohort, source), part in own.groupby(["cohort", "source"]):
        summary.setdefault(cohort, {})[source] = summarise_all(part, regions, seed)[cohort]
    return {"by_source": summary}


def label_cohort(row: Any) -> str:
    """Return the cohort of a case, "internal: NAME" where those of several were trained on.

    `row` is a row of metrics_per_case.csv as a named tuple.
    """
    return f"internal: {row.source}" if row.cohort == "internal" and hasattr(row, "source") else row.cohort


def list_missing(summary: Mapping[str, Any]) -> list[str]:
    """Return in words how many cases of a cohort lack which modalities, from a summary.json."""
    return [
        f"{cohort}: {count} cases have no {names}"
        for cohort, counts in summary.get("missing_modalities", {}).items()
        for names, count in counts.items()
    ]


def count_missing(cohorts: Mapping[str, Sequence[PreparedCase]], compared: str) -> dict[str, Any]:
    """Return {"missing_modalities": {cohort: {modalities as text: cases without them}}}; empty for none.

    With it comes {"compared_without_content": {cohort: cases}} of the tested ones that lack the modality by
    which contents are `compared`.
    """
    counts = {
        name: dict(Counter(", ".join(case.missing) for case in cases if case.missing))
        for name, cases in cohorts.items()
    }
    counts = {name: count for name, count in counts.items() if count}
    unseen = {
        name: sum(compared in case.missing for case in cases)
        for name, cases in cohorts.items()
        if name != "validation"
    }
    unseen = {name: count for name, count in unseen.items() if count}
    found = {"missing_modalities": counts, "compared_without_content": unseen}
    return {name: content for name, content in found.items() if content}
