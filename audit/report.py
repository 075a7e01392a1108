"""The audit in words: tables for the terminal and a self-contained report.html. Numbers come from outside."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from audit.page import write_page
from audit.postprocess import describe_postprocessing
from audit.results import AuditResults, headline_mode
from audit.statistics import format_spread
from cohort.leakage import EVIDENCE, NOTES
from cohort.phantom import PHANTOM_NOTE
from runtime.log import log

MODE_NAMES = {"plain": "plain", "tta": "TTA"}
PROVENANCE = ("command", "checkpoint_sha256", "split_sha256", "hardware", "versions")
WORST_CASES = 3  # per cohort and region


# ------------------------------------------------------------------------------------------------------------
# Tables of formatted cells
# ------------------------------------------------------------------------------------------------------------


def format_number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many decimals; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_interval(edges: Sequence[float] | None, style: str) -> str:
    """Return both edges in a format style; "-" for None."""
    return "-" if edges is None else " to ".join(style.format(edge) for edge in edges)


def _lesions(scores: Mapping[str, Any]) -> str:
    return f"{scores['lesions_tp']} / {scores['lesions_fn']} / {scores['lesions_fp']}"


def _by_region(summary: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield the first cells and the modes of each cohort and region."""
    for cohort, regions in summary["cohorts"].items():
        for region, modes in regions.items():
            yield {"cohort": cohort, "region": region}, modes


def _modes(modes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the modes there are and their names; without TTA the masks are another tool's."""
    return [
        (mode, name if "tta" in modes else "as given") for mode, name in MODE_NAMES.items() if mode in modes
    ]


def tabulate_scores(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return Dice and the other metrics of each cohort, region and mode."""
    rows = []
    for place, modes in _by_region(summary):
        for mode, name in _modes(modes):
            scores = modes[mode]
            dice = scores["dice"]
            ratios = {}
            for metric in ("precision", "recall"):
                undefined = scores[metric]["n_undefined"]
                ratios[metric] = format_number(scores[metric]["mean"])
                ratios[metric] += f" ({undefined} undefined)" if undefined else ""
            rows.append(
                {
                    **place,
                    "mode": name,
                    "cases / patients": f"{scores['n_cases']} / {scores['n_patients']}",
                    "Dice per case": format_number(dice["mean"]),
                    "95 % CI": format_spread(dice, "{:.3f}"),
                    "SD": format_number(dice["sd"]),
                    "median": format_number(dice["median"]),
                    **ratios,
                    "HD95 mm": format_number(scores["hd95_mm"]["mean"], 1),
                    "NSD 1 mm": format_number(scores["nsd_1mm"]["mean"]),
                    "slice Dice": format_number(scores["dice_slice"]),
                    "pooled Dice": format_number(scores["dice_pooled"]),
                    "empty ref / pred": f"{scores['n_empty_reference']} / {scores['n_empty_prediction']}",
                }
            )
    return pd.DataFrame(rows)


def tabulate_gains(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the paired change of Dice per case by TTA and by post-processing, per cohort and region."""
    rows = []
    for key, name in (("tta_gain", "TTA"), ("postprocessing_gain", "post-processing")):
        for place, modes in _by_region(summary):
            if gain := modes.get(key):
                rows.append(
                    {
                        **place,
                        "effect of": name,
                        "change of Dice per case": f"{gain['mean']:+.4f}",
                        "95 % CI": format_spread(gain, "{:+.4f}"),
                        "sign-flip p": f"{gain['p_sign_flip']:.3g}",
                        "cases": str(gain["n"]),
                    }
                )
    return pd.DataFrame(rows)


def tabulate_lesions(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the lesion-wise scores and volume errors of each cohort, region and mode."""
    rows = []
    for place, modes in _by_region(summary):
        for mode, name in _modes(modes):
            scores, error = modes[mode], modes[mode]["volume_error_ml"]
            rows.append(
                {
                    **place,
                    "mode": name,
                    "lesion Dice": format_number(scores["lesion_dice"]["mean"]),
                    "95 % CI": format_spread(scores["lesion_dice"], "{:.3f}"),
                    "lesion HD95 mm": format_number(scores["lesion_hd95_mm"]["mean"], 1),
                    "lesions found / missed / false": _lesions(scores),
                    "volume error ml": f"{error['mean']:+.2f}",
                    "SD": format_number(error["sd"], 2),
                    "limits of agreement": format_interval(error["limits_of_agreement"], "{:+.2f}"),
                }
            )
    return pd.DataFrame(rows)


def tabulate_postprocessing(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the scores with TTA, without and with post-processing; empty where the checkpoint has none."""
    rows = []
    for place, modes in _by_region(summary):
        if "tta_raw" not in modes:
            continue
        for name, scores in (("without", modes["tta_raw"]), ("with", modes["tta"])):
            rows.append(
                {
                    **place,
                    "post-processing": name,
                    "Dice per case": format_number(scores["dice"]["mean"]),
                    "HD95 mm": format_number(scores["hd95_mm"]["mean"], 1),
                    "NSD 1 mm": format_number(scores["nsd_1mm"]["mean"]),
                    "lesion Dice": format_number(scores["lesion_dice"]["mean"]),
                    "lesion HD95 mm": format_number(scores["lesion_hd95_mm"]["mean"], 1),
                    "lesions found / missed / false": _lesions(scores),
                }
            )
    return pd.DataFrame(rows)


def tabulate_calibration(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the calibration errors on validation of each region and mode."""
    rows = [
        {
            "cohort": "validation",
            "region": region,
            "mode": MODE_NAMES[mode],
            "expected calibration error": format_number(errors["ece"], 4),
            "of the uncertain": format_number(errors["ece_uncertain"], 4),
            "voxels of brain": f"{errors['n_voxels']:,}",
            "uncertain ones": f"{errors['n_voxels_uncertain']:,}",
        }
        for region, modes in summary["calibration"].items()
        for mode, errors in modes.items()
    ]
    return pd.DataFrame(rows)


def tabulate_uncertainty(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rank correlation of uncertainty and Dice of each cohort and region; empty without TTA."""
    rows = [
        {
            **place,
            "cases": str(found["n"]),
            "rank correlation of Dice and uncertainty": format_number(found["spearman"]),
        }
        for place, modes in _by_region(summary)
        if (found := modes.get("uncertainty_and_dice"))
    ]
    return pd.DataFrame(rows)


def tabulate_worst(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the test cases with the lowest Dice (TTA, where there is) of each cohort and region."""
    tested = rows[(rows["cohort"] != "validation") & (rows["mode"] == headline_mode(rows))]
    lowest = tested.sort_values("dice").groupby(["cohort", "region"], sort=False).head(WORST_CASES)
    cells = [
        {
            "cohort": row.cohort,
            "region": row.region,
            "case": row.case,
            "Dice": format_number(row.dice),
            "HD95 mm": format_number(row.hd95_mm, 1),
            "reference ml": format_number(row.reference_ml, 1),
            "prediction ml": format_number(row.prediction_ml, 1),
        }
        for row in lowest.sort_values(["cohort", "region"]).itertuples()
    ]
    return pd.DataFrame(cells)


# ------------------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------------------


def list_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Return the warnings that belong above the numbers."""
    warnings = []
    if scored := summary.get("predictions"):
        warnings.append(
            "These masks were made by another tool. What it was trained on is not known here, so no search "
            "for leakage was made and nothing says that the cases were held out."
        )
        if copies := scored["n_identical"]:
            warnings.append(f"{copies} prediction(s) equal their reference voxel for voxel: are they copies?")
        if missing := len(scored["missing"]):
            warnings.append(
                f"{missing} of {scored['n_cases']} cases have no prediction and are in no number; "
                "a tool that fails on hard cases looks better without them."
            )
        if unknown := len(scored["unknown"]):
            warnings.append(f"{unknown} prediction(s) belong to no case with a reference and are not scored.")
    if summary["data_kind"] == "phantom":
        warnings.append(f"These are {PHANTOM_NOTE}.")
    for cohort, count in summary["seen_in_training"].items():
        if count["seen"]:
            rest = "" if count["unseen"] else "; no unseen case is left, so this cohort is not a test set"
            warnings.append(
                f"{cohort}: {count['seen']} of {count['cases']} cases were in training or validation, "
                f"{count['unseen']} unseen: not a held-out result{rest}."
            )
    for grade, count in summary.get("leakage_grades", {}).items():
        if grade in (EVIDENCE[name] for name in NOTES):
            warnings.append(
                f"{count} tested case(s): {grade}. This is no proof and does not count as seen: look at them."
            )
    if "external_unseen" in summary["cohorts"]:
        warnings.append("external_unseen is the external cohort without the cases that were seen.")
    return warnings


def describe_choices(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return in words what was chosen on validation: the thresholds and the post-processing."""
    choice = summary["postprocessing"]
    words = "none in the checkpoint"
    if choice is not None:
        words = describe_postprocessing(choice["settings"])
        words += "; plain and TTA are with it" if choice["settings"] else ""
    thresholds = ", ".join(f"{region} {value:.2f}" for region, value in summary["threshold"].items())
    return {"threshold": thresholds, "postprocessing": words}


def log_summary(summary: Mapping[str, Any]) -> None:
    """Log warnings, tables, and what was chosen on validation."""
    for warning in list_warnings(summary):
        log.warning("%s", warning)
    tables = (tabulate_scores, tabulate_lesions, tabulate_calibration, tabulate_gains, tabulate_uncertainty)
    for tabulate in tables:
        table = tabulate(summary)
        if not table.empty:
            log.info("\n%s", table.to_string(index=False))
    log.info("")
    if summary.get("predictions"):
        return
    choices = describe_choices(summary)
    log.info("threshold, chosen on validation: %s", choices["threshold"])
    log.info("post-processing, chosen on validation: %s", choices["postprocessing"])


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def write_report(path: Path, results: AuditResults, figures: Mapping[str, Path]) -> None:
    """Write one HTML file that needs no other; `figures` are {caption: PNG} in the order shown."""
    summary = results.summary
    write_page(
        path,
        "report.html.j2",
        run=results.run.name,
        warnings=list_warnings(summary),
        choices=describe_choices(summary),
        tables={
            "scores": tabulate_scores(summary),
            "gains": tabulate_gains(summary),
            "lesions": tabulate_lesions(summary),
            "postprocessing": tabulate_postprocessing(summary),
            "calibration": tabulate_calibration(summary),
            "uncertainty": tabulate_uncertainty(summary),
            "worst": tabulate_worst(results.rows),
            "leakage": results.leakage,
        },
        figures={caption: base64.b64encode(plot.read_bytes()).decode() for caption, plot in figures.items()},
        provenance={name: summary[name] for name in PROVENANCE if summary[name] is not None},
        scored=summary.get("predictions"),
    )
