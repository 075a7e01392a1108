"""The audit in one glance: the headline figures, and a sentence each on what else a reader asks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from audit.browse import SPACING_ASSUMED, tested_rows
from audit.statistics import format_spread

SHARE_OF_ERRORS = 2 / 3  # from which one kind of error is called the main one


class Card(NamedTuple):
    """The headline of one cohort and region."""

    cohort: str
    region: str
    mean: str
    spread: str
    median: str
    count: str
    held_out: str  # what is known of it
    is_clean: bool | None  # None: not known
    sources: Sequence[str]  # the same of each cohort trained on, where there are several


class Worst(NamedTuple):
    """The case with the lowest Dice of one cohort and region, and why."""

    cohort: str
    region: str
    case: str
    key: str
    dice: str
    reason: str


def make_cards(summary: Mapping[str, Any]) -> list[Card]:
    """Return the headline Dice of each test cohort and region, with TTA where there is."""
    cards = []
    for cohort, region, modes in _tested(summary):
        scores = _scores(modes)
        held_out, is_clean = _describe_seen(summary, cohort)
        cards.append(
            Card(
                cohort,
                region,
                f"{scores['dice']['mean']:.3f}",
                format_spread(scores["dice"], "{:.3f}", "95 % CI "),
                f"{scores['dice']['median']:.3f}",
                _count(scores["n_cases"], "case") + " of " + _count(scores["n_patients"], "patient"),
                held_out,
                is_clean,
                _describe_sources(summary, cohort, region),
            )
        )
    return cards


def _tested(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for cohort, regions in summary["cohorts"].items():
        if cohort != "validation":
            for region, modes in regions.items():
                yield cohort, region, modes


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def _describe_seen(summary: Mapping[str, Any], cohort: str) -> tuple[str, bool | None]:
    """Return in words whether a cohort is held out, and as a truth value."""
    if cohort == "external_unseen":
        return "external without the seen cases", True
    seen = summary["seen_in_training"].get(cohort)
    if seen is None:
        return "not known whether held out", None
    if seen["seen"]:
        return f"{seen['seen']} of {_count(seen['cases'], 'case')} seen in training or validation", False
    return f"none of {_count(seen['cases'], 'case')} found in training or validation", True


def _describe_sources(summary: Mapping[str, Any], cohort: str, region: str) -> list[str]:
    """Return in words the Dice of each cohort trained on among the cases of a test cohort."""
    described = []
    for source, regions in summary.get("by_source", {}).get(cohort, {}).items():
        scores = _scores(regions[region])
        count, spread = _count(scores["n_cases"], "case"), format_spread(scores["dice"], "{:.3f}", "95 % CI ")
        described.append(f"{source}, {count}: {scores['dice']['mean']:.3f} ({spread})")
    return described


def find_worst(rows: pd.DataFrame) -> list[Worst]:
    """Return the worst case of each test cohort and region, and what its errors are."""
    worst = []
    for (cohort, region), of_region in tested_rows(rows).groupby(["cohort", "region"], sort=False):
        row = of_region.loc[of_region["dice"].idxmin()]
        key = f"{cohort}/{row['case']}"
        worst.append(Worst(cohort, region, row["case"], key, f"{row['dice']:.3f}", describe_errors(row)))
    return worst


def describe_errors(row: Mapping[str, Any]) -> str:
    """Return in words what is wrong with a case's mask: from its row of metrics_per_case.csv."""
    reference, prediction = f"{row['reference_ml']:.1f} ml", f"{row['prediction_ml']:.1f} ml"
    missed, extra = row["fn"], row["fp"]
    if not missed + extra:
        return "no wrong voxel"
    if not row["reference_ml"]:
        return f"{prediction} predicted where the reference is empty"
    if not row["prediction_ml"]:
        return f"nothing predicted where the reference has {reference}"
    if not row["tp"]:
        return f"{prediction} predicted beside the {reference} of the reference"
    share = missed / (missed + extra)
    region = row["region"]
    words = f"{share:.0%} of its wrong voxels are missed {region}, {1 - share:.0%} too much"
    if share >= SHARE_OF_ERRORS:
        words = f"misses {region}: {share:.0%} of its wrong voxels are missed {region}"
    elif share <= 1 - SHARE_OF_ERRORS:
        words = f"predicts too much: {1 - share:.0%} of its wrong voxels are no {region}"
    lesions = [
        f"{_count(int(row[name]), f'{word} lesion')}"
        for name, word in (("lesions_fn", "missed"), ("lesions_fp", "false"))
        if row[name]
    ]
    return "; ".join([f"{words} (predicts {prediction}, the reference has {reference})", *lesions])


def write_sentences(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return one sentence each on TTA, calibration, lesions and volume bias; all cohorts and regions."""
    sentences = {
        "TTA": _join(
            f"{gain['mean']:+.4f} in {place} ({format_spread(gain, '{:+.4f}', '95 % CI ')})"
            for place, modes in _places(summary)
            if (gain := modes.get("tta_gain"))
        ),
        "Calibration": _join(
            f"{region} {modes['tta']['ece_uncertain']:.3f}"
            for region, modes in summary["calibration"].items()
            if modes["tta"]["ece_uncertain"] is not None
        ),
        "Lesions": _join(
            f"{scores['lesions_tp']} of {scores['lesions_tp'] + scores['lesions_fn']} found and "
            f"{scores['lesions_fp']} false in {place}"
            for place, modes in _places(summary)
            if (scores := _scores(modes))
        ),
        "Volume bias": _join(
            f"{error['mean']:+.1f} ml in {place} ({format_spread(error, '{:+.1f}', '95 % CI ')})"
            for place, modes in _places(summary)
            if (error := _scores(modes)["volume_error_ml"])
        ),
    }
    starts = {
        "TTA": "changes Dice per case by ",
        "Calibration": "expected calibration error of the uncertain voxels, on validation with TTA: ",
        "Lesions": "",
        "Volume bias": "prediction minus reference is ",
    }
    return {name: f"{starts[name]}{text}." for name, text in sentences.items() if text}


def _scores(modes: Mapping[str, Any]) -> Mapping[str, Any]:
    return modes.get("tta") or modes["plain"]


def _places(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield "internal WT" and its modes, without the region where there is one alone."""
    regions = {region for _, region, _ in _tested(summary)}
    for cohort, region, modes in _tested(summary):
        yield cohort if len(regions) == 1 else f"{cohort} {region}", modes


def _join(parts: Iterator[str]) -> str:
    return "; ".join(parts)


def list_marks(
    summary: Mapping[str, Any], notes: Mapping[tuple[str, str], Sequence[str]], postprocessing: str
) -> list[str]:
    """Return what qualifies the headline beside the warnings: assumed spacing, post-processing."""
    marks = []
    assumed = sum(SPACING_ASSUMED in of_case for of_case in notes.values())
    if assumed:
        marks.append(
            f"The voxel spacing of {_count(assumed, 'tested case')} is not in the files and is assumed: "
            "volumes and distances are only as right as that."
        )
    chosen = [summary, *(summary.get("folds") or ())]
    if any((each["postprocessing"] or {}).get("settings") for each in chosen):
        marks.append(
            f"The masks are post-processed ({postprocessing}). The numbers without are under All numbers, "
            "Post-processing."
        )
    return marks
