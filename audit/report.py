"""The audit in words: tables for the terminal and a self-contained report.html. Numbers come from outside."""

import base64
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from audit.browse import (
    PAGE_BYTES,
    Browse,
    clear_case_pages,
    embed_cases,
    order_cases,
    pack_case,
    tested_rows,
)
from audit.folds import tabulate_folds
from audit.glossary import TERMS
from audit.headline import describe_errors, find_worst, list_marks, make_cards, write_sentences
from audit.kinds import kind_tested, list_kind_warnings
from audit.page import write_page
from audit.postprocess import describe_postprocessing
from audit.results import AuditResults, headline_mode
from audit.sources import label_cohort, list_missing
from audit.statistics import format_spread
from cohort.leakage import EVIDENCE, NOTES
from runtime.files import mark_output_folder
from runtime.log import log, progress

MODE_NAMES = {"plain": "plain", "tta": "TTA"}
PROVENANCE = ("command", "checkpoint_sha256", "split_sha256", "hardware", "versions")
CASE_COLUMNS = (
    "case", "cohort", "region", "Dice", "HD95 mm", "lesions", "reference ml", "prediction ml", "uncertainty",
    "notes",
)  # fmt: skip
PAGE_OVERHEAD, ROW_BYTES = 500_000, 1500  # bytes of a page without cases, and of a row of its case table


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


def tabulate_sources(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the scores of validation and internal test per cohort trained on; empty where it is one."""
    by_source = {
        f"{cohort}: {source}": regions
        for cohort, sources in summary.get("by_source", {}).items()
        for source, regions in sources.items()
    }
    return tabulate_scores({"cohorts": by_source})


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
    warnings += list_kind_warnings(summary)
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
    for words in list_missing(summary):
        warnings.append(f"{words}, filled as --modality-dropout did in training.")
    if "external_unseen" in summary["cohorts"]:
        warnings.append("external_unseen is the external cohort without the cases that were seen.")
    return warnings


def list_leakage_notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what the search for leakage could not see, or was told not to count."""
    notes = []
    for cohort, count in summary.get("compared_without_content", {}).items():
        notes.append(
            f"{count} {cohort} case(s) lack the modality by which contents are compared: they were compared "
            "by id, mapping and mask alone."
        )
    if pairs := summary.get("declared_different"):
        notes.append(
            f"{len(pairs)} pair(s) that look alike count as two people, as a person declared (--different)."
        )
    return notes


def describe_choices(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return in words the thresholds and the post-processing, and that validation chose them."""
    choice = summary["postprocessing"]
    words = "none in the checkpoint"
    if choice is not None:
        words = describe_postprocessing(choice["settings"])
        words += "; plain and TTA are with it" if choice["settings"] else ""
    thresholds = ", ".join(f"{region} {value:.2f}" for region, value in summary["threshold"].items())
    if folds := summary.get("folds"):
        validated = {fold["n_cases"]["validation"] for fold in folds}
        with_external = "external" in summary["cohorts"]
        thresholds = f"; external {thresholds}, the mean of these" if with_external else ""
        words = f"; external {words}, the median of these" if with_external else ""
        thresholds, words = (f"internal each fold's own, see Folds{each}" for each in (thresholds, words))
    else:
        regions = summary["cohorts"].get("validation", {})
        validated = {modes["plain"]["n_cases"] for modes in regions.values()}
    by = "chosen on validation"
    of_one = "0.5, as one validation case chooses none"
    return {
        "threshold": f"{of_one if validated == {1} else by}: {thresholds}",
        "postprocessing": f"{by}: {words}",
    }


def log_summary(summary: Mapping[str, Any]) -> None:
    """Log warnings, tables, and what was chosen on validation."""
    for warning in list_warnings(summary):
        log.warning("%s", warning)
    tables = (
        tabulate_scores,
        tabulate_sources,
        tabulate_lesions,
        tabulate_calibration,
        tabulate_gains,
        tabulate_uncertainty,
        tabulate_folds,
    )
    for tabulate in tables:
        table = tabulate(summary)
        if not table.empty:
            log.info("\n%s", table.to_string(index=False))
    log.info("")
    if summary.get("predictions"):
        return
    if summary.get("folds"):
        log.info("%s", summary["averaged_over"])
    choices = describe_choices(summary)
    log.info("threshold %s", choices["threshold"])
    log.info("post-processing %s", choices["postprocessing"])


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def write_report(
    path: Path, results: AuditResults, figures: Mapping[str, Path], browse: Browse = "chosen"
) -> None:
    """Write one HTML file that needs no other; `figures` are {caption: PNG} in the order shown.

    Where a figure has an SVG beside its PNG, that is shown. With `browse` "all" each test case gets a page in
    `cases` beside it, to which the page links.
    """
    summary = results.summary
    pictures = [_show_figure(caption, plot) for caption, plot in figures.items()]
    case_rows = list_cases(results)
    keys = order_cases(results.rows)
    describe = functools.partial(describe_case, results)
    clear_case_pages(path.with_name("cases"))
    budget = PAGE_BYTES - PAGE_OVERHEAD - ROW_BYTES * len(case_rows) - sum(map(_size_of, pictures))
    embedded = embed_cases(keys, describe, results.open_case, budget)
    pages = write_case_pages(path.with_name("cases"), results, describe) if browse == "all" else {}
    choices = describe_choices(summary)
    tables = {
        "scores": tabulate_scores(summary),
        "folds": tabulate_folds(summary),
        "sources": tabulate_sources(summary),
        "gains": tabulate_gains(summary),
        "lesions": tabulate_lesions(summary),
        "postprocessing": tabulate_postprocessing(summary),
        "calibration": tabulate_calibration(summary),
        "uncertainty": tabulate_uncertainty(summary),
        "leakage": results.leakage.map(_cell),
    }
    used = {word for table in tables.values() for word in table.columns} | set(CASE_COLUMNS)
    cards = make_cards(summary)
    write_page(
        path,
        "report.html.j2",
        run=results.run.name,
        # written after this page, see audit/pages.py
        has_run_page=path.parent == results.run / "evaluation" and (results.run / "best.pt").is_file(),
        is_real=kind_tested(summary) != "phantom",
        warnings=list_warnings(summary),
        cards=cards,
        has_tta=headline_mode(results.rows) == "tta",
        marks=list_marks(summary, results.notes, choices["postprocessing"]),
        sentences=write_sentences(summary),
        worst=find_worst(results.rows),
        many_regions=len({card.region for card in cards}) > 1,
        many_cohorts=len({row["cohort"] for row in case_rows}) > 1,
        cohorts=list(dict.fromkeys(map(label_cohort, tested_rows(results.rows).itertuples()))),
        regions=list(results.rows["region"].unique()),
        case_columns=CASE_COLUMNS,
        case_rows=case_rows,
        case_count=len(keys),
        not_embedded=len(keys) - len(embedded),
        limit_mb=PAGE_BYTES // 1_000_000,
        embedded=list(embedded.values()),
        keys={case["key"] for case in embedded.values()},
        pages=pages,
        choices=choices,
        tables=tables,
        leakage_notes=list_leakage_notes(summary),
        averaged_over=summary.get("averaged_over", ""),
        terms=TERMS,
        used_terms={word: meaning for word, meaning in TERMS.items() if word in used},
        figures=pictures,
        provenance={name: summary[name] for name in PROVENANCE if summary[name] is not None},
        scored=summary.get("predictions"),
    )


def list_cases(results: AuditResults) -> list[dict[str, Any]]:
    """Return the rows of the page's case table, one per test case and region, the lowest Dice first."""
    return [
        {
            "key": f"{row.cohort}/{row.case}",
            "case": row.case,
            "cohort": label_cohort(row),
            "region": row.region,
            "cells": (
                format_number(row.dice),
                format_number(row.hd95_mm, 1),
                f"{row.lesions_tp} / {row.lesions_fn} / {row.lesions_fp}",
                format_number(row.reference_ml, 1),
                format_number(row.prediction_ml, 1),
                format_number(_known(getattr(row, "uncertainty", None))),
            ),
            "notes": "; ".join(note_case(results, row)),
        }
        for row in tested_rows(results.rows).sort_values("dice", kind="stable").itertuples()
    ]


def _cell(value: Any) -> str:
    """Return a cell of leakage.csv for the page: three decimals, "-" for what is not known."""
    if isinstance(value, float):
        return format_number(_known(value))
    return str(value)


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def note_case(results: AuditResults, row: Any) -> list[str]:
    """Return what a reader must know of a case: a row of metrics_per_case.csv as a named tuple."""
    notes = list(results.notes.get((row.cohort, row.case), ()))
    if not pd.isna(row.seen_in_training) and row.seen_in_training:  # neither: not known
        notes.insert(0, "seen in training or validation")
    if not row.reference_ml:
        notes.append(f"{row.region}: reference empty")
    if not row.prediction_ml:
        notes.append(f"{row.region}: nothing predicted")
    return notes


def describe_case(results: AuditResults, cohort: str, case_id: str) -> dict[str, Any]:
    """Return what the viewer says of a case beside its volumes."""
    tested = tested_rows(results.rows)
    rows = list(tested[(tested["cohort"] == cohort) & (tested["case"] == case_id)].itertuples())
    numbers = [f"{row.region} Dice {row.dice:.3f}, HD95 {row.hd95_mm:.1f} mm" for row in rows]
    notes = [f"{row.region}: {describe_errors(row._asdict())}" for row in rows]
    if len(rows) == 1:
        notes = [describe_errors(rows[0]._asdict())]
    label = label_cohort(rows[0])
    return {
        "key": f"{cohort}/{case_id}",
        "name": case_id,
        "about": ("Synthetic phantom. " if results.is_phantom(cohort, case_id) else "")
        + f"{label[0].upper()}{label[1:]} case. "
        + "; ".join(numbers),
        "notes": list(dict.fromkeys([*notes, *(note for row in rows for note in note_case(results, row))])),
        "regions": [row.region for row in rows],
    }


def write_case_pages(
    folder: Path, results: AuditResults, describe: Callable[[str, str], dict[str, Any]]
) -> dict[str, str]:
    """Write a page per test case into `folder` and return {key: file name}."""
    mark_output_folder(folder)
    tested = tested_rows(results.rows)
    names = {}
    cases = list(tested[["cohort", "case"]].drop_duplicates().itertuples(index=False))
    for number, (cohort, case_id) in enumerate(progress(cases, "case pages", "case"), 1):
        case = pack_case(results.open_case(cohort, case_id), describe(cohort, case_id))
        names[case["key"]] = f"{number:04d}.html"  # a number, as a case's name may be anything
        is_real = not results.is_phantom(cohort, case_id)
        page = folder / names[case["key"]]
        write_page(page, "case.html.j2", run=results.run.name, case=case, is_real=is_real)
    return names


def _show_figure(caption: str, plot: Path) -> dict[str, Any]:
    """Return a figure for the template: its SVG where there is one, else its PNG as base64."""
    drawing = plot.with_suffix(".svg")
    if not drawing.exists():
        png = base64.b64encode(plot.read_bytes()).decode()
        return {"caption": caption, "png": png, "svg": "", "is_wide": True}
    text = drawing.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)  # several figures are on one page
    return {"caption": caption, "png": "", "svg": Markup(text), "is_wide": False}  # escaped when it was drawn


def _size_of(picture: Mapping[str, Any]) -> int:
    return len(picture["png"]) + len(picture["svg"])
