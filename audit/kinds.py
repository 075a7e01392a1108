"""Which of the cases tested are synthetic phantoms and which are patients.

What a network was trained on (`data_kind`) does not say it: one that has learnt phantoms can be tested on
patients, and the other way round.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cohort.cache import PreparedCase
from cohort.phantom import PHANTOM_NOTE, join_kinds, name_kind

KIND_WORDS = {"phantom": "synthetic phantoms", "real": "patients", "mixed": "patients and synthetic phantoms"}
TRAINED_ON_PHANTOMS = "the network was trained on synthetic phantoms; its masks of real scans mean nothing"


def find_kinds(cohorts: Mapping[str, Sequence[PreparedCase]]) -> dict[str, str]:
    """Return per cohort "phantom", "real" or "mixed": what summary.json has as "kinds"."""
    return {name: name_kind(case.is_phantom for case in cases) for name, cases in cohorts.items() if cases}


def list_phantoms(cohorts: Mapping[str, Sequence[PreparedCase]]) -> frozenset[tuple[str, str]]:
    """Return (cohort, case id) of the cases that are phantoms."""
    return frozenset(
        (name, case.case_id) for name, cases in cohorts.items() for case in cases if case.is_phantom
    )


def kind_of(summary: Mapping[str, Any], cohort: str) -> str:
    """Return the kind of a cohort of a summary.json; an earlier version says that of training alone."""
    name = "external" if cohort == "external_unseen" else cohort
    return summary.get("kinds", {}).get(name, summary.get("data_kind", "unknown"))


def kind_tested(summary: Mapping[str, Any]) -> str:
    """Return the kind of all test cases of a summary.json together."""
    return join_kinds(kind_of(summary, cohort) for cohort in summary["cohorts"] if cohort != "validation")


def note_kind(kind: str) -> str:
    """Return what a title says of cases of a kind; nothing of patients."""
    return {"phantom": f" ({PHANTOM_NOTE})", "mixed": " (some are synthetic phantoms)"}.get(kind, "")


def list_kind_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Return what must be said above the numbers: which cases are phantoms, what the network has learnt."""
    tested = kind_tested(summary)
    if tested == "phantom":
        return [f"These are {PHANTOM_NOTE}."]
    warnings = []
    for cohort in summary["cohorts"]:
        kind = kind_of(summary, cohort)
        if cohort != "validation" and kind != "real":
            warnings.append(f"{cohort}: {PHANTOM_NOTE if kind == 'phantom' else KIND_WORDS[kind]}.")
    if summary["data_kind"] == "phantom" and not summary.get("predictions"):
        warnings.append(f"{TRAINED_ON_PHANTOMS[0].upper()}{TRAINED_ON_PHANTOMS[1:]}.")
    return warnings
