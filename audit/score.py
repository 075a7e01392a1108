"""The audit of masks that another tool made: the same numbers and figures, without a network.

    python final_evaluation_v2.py --predictions DIR --data-dir D

There are masks and no probabilities, so one mode, plain, and nothing of TTA, thresholds or calibration. What
the other tool was trained on is not known, and the output says so.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from audit.browse import Browse
from audit.figures import draw_figures
from audit.measure import measure_case, summarise_all
from audit.pages import write_index
from audit.report import log_summary, write_report
from audit.results import AuditResults, CaseVolumes, read_summary
from cohort.cases import Case, read_modality, with_reference
from cohort.layouts import CaseSource, log_cases, scan_cases
from cohort.phantom import is_phantom, name_kind
from cohort.predictions import (
    SHOWN,
    Matched,
    collect_values,
    is_binary,
    match_predictions,
    read_masks,
    usual_regions,
)
from runtime import signals
from runtime.claims import claim_folder
from runtime.command import command_line
from runtime.errors import InputError
from runtime.files import write_json
from runtime.log import log
from runtime.machine import describe_machine, describe_versions
from runtime.processes import map_in_processes
from runtime.ranks import is_main
from runtime.tables import write_table

PARTIAL = "stopped_per_case.csv"  # rows of an audit that a signal stopped
COHORT = "predictions"  # the name in the summary: whether they are held out is not known


@dataclass(frozen=True)
class ScoreSettings:
    """What is scored, and where to."""

    predictions: Path  # folder of masks
    source: CaseSource  # of the cases with their references
    regions: tuple[str, ...] | None  # None: all that the cases' label convention has
    allow_missing: bool
    output: Path | None
    seed: int  # of the bootstrap
    browse: Browse = "chosen"  # which cases the report shows in its viewer

    @property
    def name(self) -> str:
        """What stands for the name of a run."""
        return f"scores_{self.predictions.resolve().name}"

    @property
    def folder(self) -> Path:
        """The folder to write to, placed as that of a run's audit, so that --compare takes it."""
        return self.output or Path("results") / self.name / "evaluation"


def choose_scoring(config: Any) -> ScoreSettings | None:
    """Return what is scored without a network, None without --predictions; InputError on flags at odds.

    `config` is the EvaluationConfig of final_evaluation_v2.
    """
    if config.predictions is None:
        for flag, given in (("--regions", config.regions), ("--allow-missing", config.allow_missing)):
            if given:
                raise InputError(flag, "belongs to --predictions", "leave it out; a run has its own regions")
        return None
    if config.data_dir is None:
        raise InputError(
            "--predictions", "the references are not named", "name the cases' folder by --data-dir"
        )
    for flag, given in (("--run", config.run), ("--external-dir", config.external.data_dir)):
        if given:
            raise InputError(flag, "does not go with --predictions, which has no network", "leave one out")
    return ScoreSettings(
        predictions=Path(config.predictions),
        source=CaseSource(
            config.data_dir,
            config.external.layout,
            config.external.mapping,
            config.external.slice_channel,
        ),
        regions=config.regions,
        allow_missing=config.allow_missing,
        output=Path(config.output) if config.output else None,
        seed=config.seed,
        browse=config.browse,
    )


def score_predictions(settings: ScoreSettings) -> None:
    """Audit the masks of another tool against their references and write numbers, plots and report."""
    folder = settings.folder
    refuse_other_scores(folder, settings.predictions)
    matched = choose_pairs(settings)
    claim_folder(folder, "choose another --output")
    cases = [case for case, _ in matched.pairs]
    values = collect_values(matched.pairs)
    regions = settings.regions or usual_regions(cases)
    conventions = {case.convention for case in cases}
    as_one = any(is_binary(convention, values, regions) for convention in conventions)
    if as_one:
        log.info("the masks hold 0 and 1 alone: every voxel of 1 is taken as %s", regions[0])
    score = functools.partial(score_case, regions=regions, is_binary=as_one)
    scored = []
    with signals.finish_first():
        for of_case in map_in_processes(score, matched.pairs, "scoring", "case"):
            scored.append(of_case)
            if signals.is_stopping():
                raise leave_partial(folder, pd.DataFrame([row for each in scored for row in each]))
    rows = pd.DataFrame([row for of_case in scored for row in of_case])
    warn_of_regions(rows)
    write_table(folder / "metrics_per_case.csv", rows)
    (folder / PARTIAL).unlink(missing_ok=True)
    summary = summarise_scores(settings, matched, rows, regions)
    write_json(folder / "summary.json", summary)
    log_summary(summary)
    leakage = pd.DataFrame(columns=["cohort", "case", "evidence", "training_case", "similarity"])
    pairs = {pair[0].case_id: pair for pair in matched.pairs}
    results = AuditResults(
        Path(settings.name),
        summary,
        rows,
        leakage,
        {},
        lambda _, case_id: open_scored(pairs[case_id], regions, as_one),
    )
    write_report(folder / "report.html", results, draw_figures(results, folder), settings.browse)
    log.info("report: %s", folder / "report.html")
    if settings.output is None:
        write_index(folder.parent.parent)


def leave_partial(folder: Path, rows: pd.DataFrame) -> signals.Stopped:
    """Write what was measured before a signal came to a table that no command reads; return what to raise."""
    cases = len(rows.drop_duplicates(["cohort", "case"]))
    path = folder / PARTIAL
    if is_main():
        write_table(path, rows)
        log.info("stopped: %d cases are measured and in %s; there is no summary of them", cases, path)
    return signals.Stopped(f"{cases} cases are in {path}; audit again for a summary", is_agreed=True)


def refuse_other_scores(folder: Path, predictions: Path) -> None:
    """Raise InputError where a folder holds an audit of other masks or of a run."""
    path = folder / "summary.json"
    if path.is_file():
        before = read_summary(path).get("predictions") or {}
        if before.get("folder") != str(predictions.resolve()):
            raise InputError(folder, "holds an audit of something else", "name another folder by --output")


def choose_pairs(settings: ScoreSettings) -> Matched:
    """Return the cases and their predictions; InputError where either is alone, unless that is allowed."""
    data_dir = settings.source.place
    cases = with_reference(scan_cases(settings.source), data_dir)
    log_cases(cases)
    matched = match_predictions(settings.predictions, cases)
    if not matched.pairs:
        first = f", first {matched.unknown[0]}" if matched.unknown else ""
        raise InputError(
            f"--predictions {settings.predictions}",
            f"holds no mask of the {len(cases)} cases in {data_dir}, first {cases[0].case_id}; "
            f"{len(matched.unknown)} other mask(s){first}",
            "name them <case>.nii.gz or <case>_seg.nii.gz",
        )
    log.info("%d of %d cases have a prediction", len(matched.pairs), len(cases))
    for what, names in (
        ("without a prediction", matched.missing),
        ("prediction(s) of no case with a reference", matched.unknown),
    ):
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            log.warning("%d %s: %s%s", len(names), what, ", ".join(names[:SHOWN]), more)
    if matched.ignored:
        log.info("%d other file(s) of these cases are no masks by name", len(matched.ignored))
    if (matched.missing or matched.unknown) and not settings.allow_missing:
        first = (*matched.missing, *matched.unknown)[0]
        raise InputError(
            f"--predictions {settings.predictions}",
            f"{len(matched.missing)} of {len(cases)} cases have no prediction and {len(matched.unknown)} "
            f"prediction(s) no case with a reference, first {first}",
            "add or remove them, or pass --allow-missing to score the others and mark the output",
        )
    return matched


def score_case(
    pair: tuple[Case, tuple[Path, ...]], regions: Sequence[str], is_binary: bool
) -> list[dict[str, Any]]:
    """Return the rows of metrics_per_case.csv of one case, one per region."""
    case, _ = pair
    masks = read_masks(pair, regions, is_binary)
    rows = []
    for region, reference, prediction in zip(regions, masks.reference, masks.prediction, strict=True):
        row = {"cohort": COHORT, "case": case.case_id, "patient": case.patient_id}
        row |= {"region": region, "mode": "plain", "seen_in_training": None}  # not known
        rows.append(row | measure_case(reference, prediction, masks.spacing_mm))
    return rows


def open_scored(pair: tuple[Case, tuple[Path, ...]], regions: Sequence[str], is_binary: bool) -> CaseVolumes:
    """Return masks and first modality of one case, read again; black where that is not on the masks' grid."""
    case, _ = pair
    masks = read_masks(pair, regions, is_binary)
    name, background = "no image", np.zeros(masks.reference.shape[1:], np.float32)
    if case.modalities:
        first = next(iter(case.modalities))
        intensities, _ = read_modality(case, first, {})
        if intensities.shape == background.shape:
            name, background = first, np.nan_to_num(intensities.astype(np.float32))
    predictions = {"prediction": masks.prediction}
    return CaseVolumes({name: background}, masks.reference, predictions, None, masks.spacing_mm)


def count_identical(rows: pd.DataFrame) -> int:
    """Return how many cases have a prediction that is the reference in every region, and not empty."""
    by_case = rows.groupby("case")[["tp", "fp", "fn"]].sum()
    return int(((by_case["fp"] + by_case["fn"] == 0) & (by_case["tp"] > 0)).sum())


def warn_of_regions(rows: pd.DataFrame) -> None:
    """Log which regions no prediction shows though references do."""
    for region, of_region in rows.groupby("region", sort=False):
        if not of_region["prediction_ml"].any() and of_region["reference_ml"].any():
            log.warning(
                "no prediction shows %s; if the tool does not segment it, leave it out of --regions", region
            )


def summarise_scores(
    settings: ScoreSettings, matched: Matched, rows: pd.DataFrame, regions: Sequence[str]
) -> dict[str, Any]:
    """Return what summary.json holds; what a network alone could give is null or empty."""
    with_files = [case for case, _ in matched.pairs if case.modalities]
    return {
        "data_kind": name_kind(map(is_phantom, with_files)) if with_files else "real",
        "includes_seen_cases": None,
        "seen_in_training": {},
        "leakage": "unknown: what these masks' tool was trained on is not known here",
        "averaged_over": "Dice per case on the native grid, mean over cases; ci95 by bootstrap over patients",
        "cohorts": summarise_all(rows, regions, settings.seed),
        "calibration": {},
        "postprocessing": None,
        "threshold": {},
        "checkpoint_sha256": None,
        "split_sha256": None,
        "predictions": {
            "folder": str(settings.predictions.resolve()),
            "data_dir": settings.source.place,
            "n_scored": len(matched.pairs),
            "n_cases": len(matched.pairs) + len(matched.missing),
            "n_identical": count_identical(rows),
            "missing": matched.missing,
            "unknown": matched.unknown,
        },
        "versions": describe_versions(),
        "hardware": describe_machine(torch.device("cpu")),
        "command": command_line(),
    }
