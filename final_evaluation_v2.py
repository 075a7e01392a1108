"""The master audit: internal test, external test, leakage, plots and a report.

    python final_evaluation_v2.py                                       the newest run in results/
    python final_evaluation_v2.py --run results/RUN --external-dir data/BraTS2019    also a run of folds
    python final_evaluation_v2.py --compare results/RUN_A results/RUN_B
    python final_evaluation_v2.py --predictions DIR --data-dir D        masks that another tool made
    torchrun --nproc-per-node 2 -- final_evaluation_v2.py --run results/RUN    the same, cases shared by ranks

The headline is Dice per case on the native grid, then the mean over cases, with a bootstrap 95 % interval
over patients. Whatever else is called Dice stands beside it under its own name. Of several ranks each decodes
and predicts its share of the cases; the main one searches for leakage, sums up, draws and writes.
"""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import numpy as np
import pandas as pd
import torch
import tyro

from audit.browse import Browse, KeptPrediction, keep_prediction, list_notes, open_cases
from audit.cohorts import choose_cohorts, fetch_seen, read_split_of, recorded_pairs
from audit.compare import compare_runs
from audit.figures import draw_figures
from audit.folds import (
    add_dice,
    describe_average,
    describe_fold,
    join_cases,
    join_cohorts,
    join_leakage,
    join_seen,
)
from audit.kinds import find_kinds, list_phantoms
from audit.measure import mean_spread, mean_uncertainty, measure_case, summarise_all
from audit.pages import write_run_pages
from audit.postprocess import postprocess, settings_of, threshold_regions
from audit.report import log_summary, write_report
from audit.results import AuditResults
from audit.score import PARTIAL, choose_scoring, leave_partial, score_predictions
from audit.seen import attach_volumes, count_grades, identify_seen, search_leakage
from audit.sources import add_origin, count_missing, summarise_by_source
from audit.statistics import CALIBRATION_EDGES, reliability_counts, summarise_calibration
from cohort.cache import PreparedCase, prepare_for_all_ranks
from cohort.cases import Case
from cohort.ensemble import join_sha256
from cohort.fingerprints import fingerprint_modality
from cohort.folds import check_alike, check_splits, is_run_of_folds, list_finished
from cohort.labels import Regions
from cohort.layouts import CaseSource, Folders
from cohort.leakage import (
    Pairs,
    identify_case,
    list_pairs,
    read_different,
    select_proven,
)
from inference_v2 import VIEWS, TrainedModel, choose_threads, join_models, load_model, predict_views
from runtime import signals
from runtime.checkpoints import newest_run
from runtime.claims import claim_folder
from runtime.command import BatchSize, Seed, command_line, run_command
from runtime.files import (
    check_output_folder,
    file_sha256,
    mark_output_folder,
    write_json,
)
from runtime.log import log, progress
from runtime.machine import DeviceName, choose_device, describe_machine, describe_versions, set_seed
from runtime.ranks import (
    agree_to_stop,
    end_together,
    from_main,
    gather_shares,
    is_main,
    join_ranks,
    local_device,
    share_of,
    world_size,
)
from runtime.tables import write_table
from utils_v2 import THRESHOLDS, overlap_at_thresholds

MODES = ("plain", "tta")


@dataclass(frozen=True)
class ExternalSource(CaseSource):
    """The external cohort: where its cases are and how they are read; with --predictions how those are."""

    data_dir: Annotated[str | None, tyro.conf.arg(name="external-dir")] = None
    """a further cohort to test on; default: the demo's own after the demo, else none"""


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the audit."""

    run: str | None = None
    """run folder to audit, of a run of folds out of fold; default: the newest in results/"""
    data_dir: Folders = None
    """folder with the run's cases, where it has moved since training, or all of them in the order of
    training; with --predictions that of the cases"""
    external: tyro.conf.OmitArgPrefixes[ExternalSource] = ExternalSource()
    compare: tuple[str, ...] = ()
    """two audited run folders to compare over their common test cases, and nothing else"""
    predictions: str | None = None
    """folder of masks that another tool made, to be scored as a run's are, without a network"""
    regions: Regions | None = None
    """with --predictions, regions to score; default: all that the cases' label convention has"""
    allow_missing: bool = False
    """with --predictions, score what is there where predictions or cases are missing, and mark the output"""
    output: str | None = None
    """folder to write to, empty or of an earlier audit; default: RUN/evaluation, with --predictions
    results/scores_DIR/evaluation"""
    overwrite: bool = False
    """write to a folder that holds files of others too"""
    browse: Browse = "chosen"
    """cases the report shows in its viewer: best, median, worst and largest errors up to 30 MB; all: a page
    for each case too"""
    different: str | None = None
    """CSV file, two columns of case ids: pairs that look alike, and a person saw that they are two people"""
    allow_seen: bool = False
    """audit test cases that were in training or validation too, and mark the output"""
    cache_dir: str = "cache"
    """folder of decoded volumes"""
    batch_size: BatchSize = 16
    """slabs a forward pass"""
    device: DeviceName = "auto"
    """where to compute"""
    amp: bool = True
    """mixed precision where the device has it"""
    seed: Seed = 0
    """seed of the bootstrap"""


# ------------------------------------------------------------------------------------------------------------
# One network, or those of all folds
# ------------------------------------------------------------------------------------------------------------


class Audited(NamedTuple):
    """What an audit of one network finds in its cohorts, or of several networks in theirs together."""

    model: TrainedModel
    audits: dict[str, "CohortAudit"]
    cohorts: dict[str, list[PreparedCase]]
    leakage: pd.DataFrame
    seen: dict[str, dict[str, int]]
    different: Pairs
    checkpoint_sha256: str = ""
    split_sha256: str = ""
    folds: Sequence[dict[str, Any]] = ()  # what the summary says of each fold


def audit_run(config: EvaluationConfig, run: Path, folder: Path, device: torch.device) -> Audited:
    """Audit the network of a run on its cohorts."""
    model = load_model(run / "best.pt", device, config.amp)
    split = read_split_of(run, model)
    chosen = from_main(choose_cohorts(config, run, model, split) if is_main() else None)
    audited = audit_cohorts(config, folder, model, chosen)
    return audited._replace(checkpoint_sha256=file_sha256(run / "best.pt"), split_sha256=split["sha256"])


def audit_folds(config: EvaluationConfig, run: Path, folder: Path, device: torch.device) -> Audited:
    """Audit each fold's network on the cases it has not seen, and all together on the external cohort."""
    folders = list_finished(run)
    files = [each / "best.pt" for each in folders]
    models = [load_model(path, device, config.amp) for path in files]
    splits = [read_split_of(each, model) for each, model in zip(folders, models, strict=True)]
    check_splits(run, dict(enumerate(splits)))
    check_alike(run, [model.checkpoint["config"] for model in models])
    whole = join_models(files, models)
    chosen = [
        from_main(choose_cohorts(config, *each, with_external=each[0] == folders[0]) if is_main() else None)
        for each in zip(folders, models, splits, strict=True)
    ]
    parts = []
    if external := chosen[0].pop("external", None):  # first, as all of it may have been seen
        at_hand = {case.case_id: case for cohorts in chosen for name in cohorts for case in cohorts[name]}
        cohorts = {"external": external, "seen": list(at_hand.values())}
        parts.append(audit_cohorts(config, folder, whole, cohorts))
    for number, (model, cohorts) in enumerate(zip(models, chosen, strict=True)):
        log.info("fold %d of 0 to %d", number, len(models) - 1)
        measured = [audit.rows for part in parts for audit in part.audits.values()]
        parts.append(audit_cohorts(config, folder, model, cohorts, measured))
        for audit in parts[-1].audits.values():
            audit.rows.insert(1, "fold", number)
    leakage = join_leakage([part.leakage for part in parts])
    if is_main():
        write_table(folder / "leakage.csv", leakage)
    described = [describe_fold(*each) for each in zip(range(len(files)), models, files, splits, strict=True)]
    return Audited(
        whole,
        join_cohorts([part.audits for part in parts]),
        join_cases([part.cohorts for part in parts]),
        leakage,
        join_seen([part.seen for part in parts]),
        frozenset().union(*(part.different for part in parts)),
        join_sha256([fold["checkpoint_sha256"] for fold in described]),
        join_sha256([fold["split_sha256"] for fold in described]),
        described,
    )


def audit_cohorts(
    config: EvaluationConfig,
    folder: Path,
    model: TrainedModel,
    chosen: dict[str, list[Case]],
    measured: Sequence[pd.DataFrame] = (),
) -> Audited:
    """Search the cohorts of `choose_cohorts` for cases that a network has seen, then predict and measure.

    Where a signal stops it, the rows `measured` before are written with its own.
    """
    settings = (model.modalities, model.regions, config.cache_dir)
    at_hand = [*chosen.pop("seen"), *chosen.get("validation", ())]
    cohorts = {name: prepare_for_all_ranks(cases, *settings) for name, cases in chosen.items()}
    training = cohorts.pop("train", [])
    different = read_different(config.different) | recorded_pairs(model.checkpoint)
    leakage, seen = None, None
    if is_main():
        mark_output_folder(folder)
        channel = model.modalities.index(fingerprint_modality(model.modalities))
        tested = {
            name: [identify_case(case, channel) for case in cases]
            for name, cases in cohorts.items()
            if name != "validation"
        }
        known = identify_seen(model.checkpoint, [*training, *cohorts.get("validation", ())], channel)
        everyone = [case for cases in tested.values() for case in cases]
        fetch = functools.partial(fetch_seen, at_hand, settings)
        known = attach_volumes(known, everyone, fetch, channel)
        leakage, seen = search_leakage(folder / "leakage.csv", tested, known, config.allow_seen, different)
    leakage, seen = from_main((leakage, seen))
    proven = select_proven(leakage)

    audits = {}
    with signals.finish_first():
        for cohort, cases in cohorts.items():
            choose_threads(model, config.batch_size)
            seen_ids = set(proven.loc[proven["cohort"] == cohort, "case"])
            log_spacing(model, cohort, cases)
            audits[cohort] = evaluate_cohort(model, cohort, cases, seen_ids, config.batch_size)
            if agree_to_stop():
                raise leave_partial(folder, pd.concat([*measured, join_rows(audits)], ignore_index=True))
    return Audited(model, audits, cohorts, leakage, seen, different)


# ------------------------------------------------------------------------------------------------------------
# The audit
# ------------------------------------------------------------------------------------------------------------


def main(config: EvaluationConfig) -> None:
    """Audit a run and write its numbers, plots and report; or compare two that were audited."""
    join_ranks()
    if config.output and is_main():
        check_output_folder(Path(config.output), config.overwrite)
    if config.compare:
        if is_main():
            if config.output:
                mark_output_folder(Path(config.output))
            compare_runs(config.compare, config.output, config.seed)
        return
    if settings := choose_scoring(config):
        if is_main():
            score_predictions(settings)
        return
    set_seed(config.seed)
    run = from_main(Path(config.run) if config.run else newest_run(Path("results")))
    folder = Path(config.output) if config.output else run / "evaluation"
    if is_main():
        if run.is_dir():
            claim_folder(run, "wait until that one ends, or audit a copy of the folder")
        claim_folder(folder, "choose another --output")
    audit_all = audit_folds if is_run_of_folds(run) else audit_run
    audited = audit_all(config, run, folder, local_device(choose_device(config.device)))
    if not is_main():
        return
    model, audits, leakage = audited.model, audited.audits, audited.leakage
    rows = add_origin(join_rows(audits), audited.cohorts)
    (folder / PARTIAL).unlink(missing_ok=True)
    if audited.folds:
        rows = rows.astype({"fold": "Int64"})  # whole numbers; external cases have none
    write_table(folder / "metrics_per_case.csv", rows)
    averaged_over = "Dice per case on the native grid, mean over cases; ci95 by bootstrap over patients"
    if audited.folds:
        averaged_over += f"; {describe_average(rows, len(audited.folds))}"
    summary = {
        "data_kind": model.checkpoint["data_kind"],
        "kinds": find_kinds(audited.cohorts),
        "includes_seen_cases": bool(len(select_proven(leakage))),
        "seen_in_training": audited.seen,
        "leakage_grades": count_grades(leakage),
        "declared_different": list_pairs(audited.different),
        "averaged_over": averaged_over,
        "cohorts": summarise_all(rows, model.regions, config.seed),
        **summarise_by_source(rows, model.regions, config.seed),
        **count_missing(audited.cohorts, fingerprint_modality(model.modalities)),
        "calibration": summarise_bins(model, audits["validation"].bins),
        "postprocessing": model.checkpoint.get("postprocessing"),
        "threshold": dict(zip(model.regions, model.thresholds, strict=True)),
        "checkpoint_sha256": audited.checkpoint_sha256,
        "weights_sha256": model.checkpoint["weights_sha256"],
        "split_sha256": audited.split_sha256,
        "versions": describe_versions(),
        "hardware": describe_machine(model.device, model.dtype),
        "command": command_line(),
        "ranks": world_size(),
        "settings": dataclasses.asdict(config),
    }
    if audited.folds:
        summary["folds"] = add_dice(audited.folds, rows)
    write_json(folder / "summary.json", summary)
    log_summary(summary)
    counts = {cohort: audit.counts["tta"] for cohort, audit in audits.items()}
    kept = {cohort: audit.kept for cohort, audit in audits.items()}
    open_case = open_cases(audited.cohorts, kept, model.modalities)
    notes = list_notes(audited.cohorts, leakage, model.find_doubts)
    phantoms = list_phantoms(audited.cohorts)
    results = AuditResults(run, summary, rows, leakage, counts, open_case, notes, phantoms)
    write_report(folder / "report.html", results, draw_figures(results, folder), config.browse)
    log.info("report: %s", folder / "report.html")
    if folder == run / "evaluation":
        write_run_pages(run)


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


class CaseAudit(NamedTuple):
    """What is measured of one case."""

    rows: list[dict[str, Any]]  # one per mode and region
    counts: dict[str, np.ndarray]  # per mode TP, FP and FN at each of THRESHOLDS (R, T, 3)
    bins: dict[str, np.ndarray]  # per mode `reliability_counts` of the brain's voxels (R, B, 3)
    kept: KeptPrediction | None = None  # with TTA, for the report's viewer; None in validation


class CohortAudit(NamedTuple):
    """What is measured of one cohort."""

    rows: pd.DataFrame  # of all cases
    counts: dict[str, np.ndarray]  # those of the cases, added up
    bins: dict[str, np.ndarray]
    kept: dict[str, KeptPrediction]  # by case id; empty in validation


def evaluate_cohort(
    model: TrainedModel, cohort: str, cases: Sequence[PreparedCase], seen: set[str], batch_size: int
) -> CohortAudit:
    """Predict and measure all cases of a cohort; `seen` are the ids of those that were in training.

    Ranks share the cases; each gets what was measured of all. After a signal the last cases are missing.
    """
    mine = []
    for case in progress(share_of(cases), f"auditing {cohort}", "case"):
        mine.append(evaluate_case(model, cohort, case, batch_size))
        if signals.is_stopping():
            break
    audits = gather_shares(mine)
    # pooled in the order of the cases, not rank by rank: bins hold sums of floats, which depend on the order
    counts = {mode: sum(audit.counts[mode] for audit in audits) for mode in MODES}
    bins = {mode: sum(audit.bins[mode] for audit in audits) for mode in MODES}
    rows = pd.DataFrame([row for audit in audits for row in audit.rows])
    rows.insert(rows.columns.get_loc("mode") + 1, "seen_in_training", rows["case"].isin(seen))
    kept = {audit.rows[0]["case"]: audit.kept for audit in audits if audit.kept}
    return CohortAudit(rows, counts, bins, kept)


def log_spacing(model: TrainedModel, cohort: str, cases: Sequence[PreparedCase]) -> None:
    """Log a warning for each way in which spacings of a cohort are unlike those of training."""
    doubts = [doubt for case in cases for doubt in model.find_doubts(case.shape[1:], case.frame)]
    for doubt, count in Counter(doubts).items():
        log.warning("%d of %d %s cases have %s", count, len(cases), cohort, doubt)


def evaluate_case(model: TrainedModel, cohort: str, case: PreparedCase, batch_size: int) -> CaseAudit:
    """Predict and measure a case; its bins are counted in validation and 0 elsewhere.

    Plain is the identity view, TTA the mean of all three; where the checkpoint has post-processing, plain_raw
    and tta_raw are the masks before it.
    """
    counts = {mode: np.zeros((len(model.regions), len(THRESHOLDS), 3), np.int64) for mode in MODES}
    bins = {mode: np.zeros((len(model.regions), len(CALIBRATION_EDGES) - 1, 3)) for mode in MODES}
    masks: dict[str, np.ndarray] = {}
    reference = case.reference
    spread = np.zeros(reference.shape, np.float32) if model.is_ensemble else None
    started = time.perf_counter()
    volume = case.volume
    views = predict_views(model, volume, case.brain_voxels, tuple(VIEWS), batch_size, case.frame, spread)
    seconds = time.perf_counter() - started
    mean = views.mean(0)  # (R, D, H, W)
    brain = case.brain if cohort == "validation" else None
    for mode, probabilities in (("plain", views[0]), ("tta", mean)):
        for index in range(len(model.regions)):
            counts[mode][index] = overlap_at_thresholds(probabilities[index], reference[index], THRESHOLDS)
            if brain is not None:
                bins[mode][index] = reliability_counts(probabilities[index][brain], reference[index][brain])
        masks |= masks_by_mode(model, mode, probabilities, case.spacing_mm)
    whole_brain = case.brain if brain is None else brain
    uncertainties = [
        mean_uncertainty(views[:, index], masks["tta"][index], whole_brain)
        if spread is None
        else mean_spread(spread[index], masks["tta"][index], whole_brain)
        for index in range(len(model.regions))
    ]
    rows = []
    for mode, predictions in masks.items():
        for index, region in enumerate(model.regions):
            row = {"cohort": cohort, "case": case.case_id, "patient": case.patient_id}
            row |= {"region": region, "mode": mode}
            row |= measure_case(reference[index], predictions[index], case.spacing_mm)
            row |= {"uncertainty": uncertainties[index] if mode == "tta" else float("nan")}
            rows.append(row | {"seconds_three_views": round(seconds, 3)})
    kept = None if cohort == "validation" else keep_prediction(masks["tta"], mean)
    return CaseAudit(rows, counts, bins, kept)


def masks_by_mode(
    model: TrainedModel, mode: str, probabilities: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, np.ndarray]:
    """Return {mode: masks (R, D, H, W) bool}, and as mode + "_raw" those before post-processing, if any."""
    masks = threshold_regions(probabilities, model.thresholds, model.regions)
    settings = settings_of(model.checkpoint)
    if not settings:
        return {mode: masks}
    return {mode: postprocess(masks, model.regions, spacing_mm, settings), f"{mode}_raw": masks}


# ------------------------------------------------------------------------------------------------------------
# Summing up
# ------------------------------------------------------------------------------------------------------------


def join_rows(audits: dict[str, CohortAudit]) -> pd.DataFrame:
    """Return the rows of all cohorts; where some external cases were seen, the others again by themselves."""
    tables = []
    for cohort, audit in audits.items():
        tables.append(audit.rows)
        unseen = audit.rows[~audit.rows["seen_in_training"]]
        if cohort == "external" and 0 < len(unseen) < len(audit.rows):
            tables.append(unseen.assign(cohort="external_unseen"))
    return pd.concat(tables, ignore_index=True)


def summarise_bins(model: TrainedModel, bins: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return {region: {mode: calibration}} of the validation cohort's counts over probability bins."""
    return {
        region: {mode: summarise_calibration(bins[mode][index]) for mode in MODES}
        for index, region in enumerate(model.regions)
    }


if __name__ == "__main__":
    run_command(
        end_together(main),
        EvaluationConfig,
        "Audit a trained run on its held-out test cases and on an external cohort. Under torchrun the ranks "
        "share the cases.",
    )
