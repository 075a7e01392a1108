"""The master audit: internal test, external test, leakage, plots and a report.

    python final_evaluation_v2.py                                       the newest run in results/
    python final_evaluation_v2.py --run results/RUN --external-dir data/BraTS2019
    python final_evaluation_v2.py --compare results/RUN_A results/RUN_B

The headline is Dice per case on the native grid, then the mean over cases, with a bootstrap 95 % interval
over patients. Whatever else is called Dice stands beside it under its own name.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from audit_plots_v2 import (
    plot_bland_altman,
    plot_dice_against_volume,
    plot_dice_per_case,
    plot_precision_recall,
    plot_ranked_cases,
    plot_reliability,
    plot_tta_gain,
)
from cases_v2 import Case, find_cases, with_reference
from compare_v2 import compare_runs
from dataset_balance_v2 import cases_of_split, read_split
from inference_v2 import VIEWS, TrainedModel, load_model, predict_views, predict_volume, threshold_regions
from measure_v2 import measure_case, summarise_all
from plots_v2 import plot_curves
from postprocess_v2 import postprocess, settings_of
from report_v2 import format_table, write_report
from statistics_v2 import CALIBRATION_EDGES, reliability_counts, summarise_calibration
from utils_v2 import (
    THRESHOLDS,
    InputError,
    choose_device,
    command_line,
    count_overlap,
    describe_machine,
    describe_versions,
    dice_from_counts,
    file_sha256,
    newest_run,
    option,
    overlap_at_thresholds,
    run_command,
    set_seed,
    write_atomically,
    write_json,
)
from volumes_v2 import PreparedCase, brain_mask, prepare_cases

MODES = ("plain", "tta")


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the audit."""

    run: str | None = option(None, "run folder to audit; default: the newest in results/")
    data_dir: str | None = option(None, "folder with the run's cases, where it has moved since training")
    external_dir: str | None = option(
        None, "a further cohort; default: the demo's own after the demo, else none"
    )
    compare: tuple[str, ...] = option(
        (), "two audited run folders to compare over their common test cases, and nothing else"
    )
    output: str | None = option(None, "folder to write to; default: RUN/evaluation")
    allow_seen: bool = option(
        False, "audit test cases that were in training or validation too, and mark the output"
    )
    cache_dir: str = option("cache", "folder of decoded volumes")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR")
    batch_size: int = option(16, "slabs a forward pass")
    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "where to compute")
    amp: bool = option(True, "mixed precision where the device has it")
    seed: int = option(0, "seed of the bootstrap")


# ------------------------------------------------------------------------------------------------------------
# Leakage
# ------------------------------------------------------------------------------------------------------------


def find_leakage(cohort: str, cases: Sequence[PreparedCase], seen: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Return a row for each case known to training or validation: cohort, case, evidence, training_case.

    `seen` holds (case id, patient id, image SHA-256) of every training and validation case. Evidence is the
    first of these three that agrees.
    """
    names = ("case id", "patient id", "image content")
    known = [{entry[column]: entry[0] for entry in seen} for column in range(3)]
    rows = []
    for case in cases:
        for name, value, table in zip(
            names, (case.case_id, case.patient_id, case.image_sha256), known, strict=True
        ):
            if value in table:
                rows.append(
                    {"cohort": cohort, "case": case.case_id, "evidence": name, "training_case": table[value]}
                )
                break
    return pd.DataFrame(rows, columns=["cohort", "case", "evidence", "training_case"])


def refuse_seen(leakage: pd.DataFrame, allow_seen: bool) -> None:
    """Raise InputError where a case to be tested was seen in training or validation, unless allowed."""
    if allow_seen or leakage.empty:
        return
    first = leakage.iloc[0]
    raise InputError(
        f"{len(leakage)} case(s) to be tested were in training or validation, first {first['case']} of the "
        f"{first['cohort']} cohort (same {first['evidence']} as {first['training_case']}); take them out, or "
        f"pass --allow-seen to audit them and mark the output."
    )


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def evaluate_cohort(
    model: TrainedModel, cohort: str, cases: Sequence[PreparedCase], seen: set[str], batch_size: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return one row per case, region and mode, the counts over thresholds, and those over probability bins.

    Per mode, pooled over the cohort: TP, FP and FN at each of THRESHOLDS (R, T, 3), and `reliability_counts`
    of the brain's voxels (R, B, 3), the latter on validation alone. Plain is the identity view, TTA the mean
    of all three; where the checkpoint has post-processing, plain_raw and tta_raw are the masks before it.
    """
    rows = []
    counts = {mode: np.zeros((len(model.regions), len(THRESHOLDS), 3), np.int64) for mode in MODES}
    bins = {mode: np.zeros((len(model.regions), len(CALIBRATION_EDGES) - 1, 3)) for mode in MODES}
    for case in tqdm(cases, desc=f"auditing {cohort}", unit="case", leave=False):
        started = time.perf_counter()
        views = predict_views(model, case.volume, case.brain_voxels, tuple(VIEWS), batch_size)
        seconds = time.perf_counter() - started
        reference = np.asarray(case.reference)
        brain = brain_mask(np.asarray(case.volume[0], np.float32)) if cohort == "validation" else None
        for mode, probabilities in (("plain", views[0]), ("tta", views.mean(0))):
            for index in range(len(model.regions)):
                counts[mode][index] += overlap_at_thresholds(
                    probabilities[index], reference[index], THRESHOLDS
                )
                if brain is not None:
                    bins[mode][index] += reliability_counts(
                        probabilities[index][brain], reference[index][brain]
                    )
            for name, masks in masks_by_mode(model, mode, probabilities, case.spacing_mm).items():
                for index, region in enumerate(model.regions):
                    row = {"cohort": cohort, "case": case.case_id, "patient": case.patient_id}
                    row |= {"region": region, "mode": name, "seen_in_training": case.case_id in seen}
                    row |= measure_case(reference[index], masks[index], case.spacing_mm)
                    rows.append(row | {"seconds_three_views": round(seconds, 3)})
    return pd.DataFrame(rows), counts, bins


def masks_by_mode(
    model: TrainedModel, mode: str, probabilities: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, np.ndarray]:
    """Return {mode: masks (R, D, H, W) bool}, and as mode + "_raw" those before post-processing, if any."""
    masks = threshold_regions(probabilities, model.thresholds, model.regions)
    settings = settings_of(model.checkpoint)
    if not settings:
        return {mode: masks}
    return {mode: postprocess(masks, model.regions, spacing_mm, settings), f"{mode}_raw": masks}


def summarise_bins(model: TrainedModel, bins: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return {region: {mode: calibration}} of the validation cohort's counts over probability bins."""
    return {
        region: {mode: summarise_calibration(bins[mode][index]) for mode in MODES}
        for index, region in enumerate(model.regions)
    }


# ------------------------------------------------------------------------------------------------------------
# Plots and report
# ------------------------------------------------------------------------------------------------------------


def rank_cases(rows: pd.DataFrame, region: str, cohort: str) -> dict[str, str]:
    """Return the case ids with the best, the median and the worst Dice (TTA); fewer for fewer cases."""
    chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == "tta")]
    ordered = chosen.sort_values("dice", ascending=False)["case"].tolist()
    ranked = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]}
    return {
        name: case
        for index, (name, case) in enumerate(ranked.items())
        if case not in list(ranked.values())[:index]
    }


def draw_plots(
    folder: Path,
    run: Path,
    model: TrainedModel,
    rows: pd.DataFrame,
    counts: dict[str, dict[str, np.ndarray]],
    cohorts: dict[str, Sequence[PreparedCase]],
    summary: dict[str, Any],
    batch_size: int,
) -> dict[str, Path]:
    """Draw every plot into `folder` and return {caption: path} in the order of the report."""
    note = " (synthetic phantoms, not a BraTS result)" if summary["data_kind"] == "phantom" else ""
    plots: dict[str, Path] = {}

    def path(name: str, caption: str) -> Path:
        plots[caption] = folder / name
        return folder / name

    log = pd.read_csv(run / "log.csv") if (run / "log.csv").exists() else pd.DataFrame()
    if len(log):
        plot_curves(
            path("training_curves.png", "Training: loss, Dice and learning rate over epochs."),
            log,
            run.name + note,
        )
    tested = rows[rows["cohort"] != "validation"]
    caption = "Dice of each test case, sorted, with TTA; the band is the bootstrap 95 % interval of the mean."
    plot_dice_per_case(path("dice_per_case.png", caption), tested, summary["cohorts"], note)
    caption = "Dice against the tumour volume of the reference, with TTA."
    plot_dice_against_volume(path("dice_against_volume.png", caption), tested, note)
    caption = "Precision and recall over thresholds, voxels pooled, with TTA; the ring is the threshold used."
    pooled = {cohort: by_mode["tta"] for cohort, by_mode in counts.items()}
    plot_precision_recall(
        path("precision_recall.png", caption), pooled, model.regions, model.thresholds, THRESHOLDS, note
    )
    caption = "Volume error: prediction minus reference against their mean, with TTA; lines at the mean and "
    caption += "the limits of agreement (mean and 1.96 SD over cases)."
    plot_bland_altman(path("volume_bland_altman.png", caption), tested, summary["cohorts"], note)
    caption = "Calibration on validation: share of reference tumour among the brain's voxels of each "
    caption += "probability, and how many voxels there are (voxels pooled, before post-processing)."
    plot_reliability(path("calibration.png", caption), summary["calibration"], note)
    caption = "What TTA changes: Dice with TTA minus Dice without, per test case."
    plot_tta_gain(path("tta_gain.png", caption), tested, summary["cohorts"], note)
    for cohort, cases in cohorts.items():
        if cohort == "validation":
            continue
        by_id = {case.case_id: case for case in cases}
        panels = []
        for rank, case_id in rank_cases(rows, model.regions[0], cohort).items():
            case = by_id[case_id]
            probabilities = predict_volume(model, case.volume, case.brain_voxels, batch_size=batch_size)
            prediction = masks_by_mode(model, "tta", probabilities, case.spacing_mm)["tta"][0]
            reference = np.asarray(case.reference[0])
            dice = dice_from_counts(*count_overlap(reference, prediction))
            panels.append(
                (
                    f"{rank}: {case_id}, Dice {dice:.3f}",
                    case.volume[0],
                    reference,
                    prediction,
                    case.spacing_mm,
                )
            )
        caption = f"Best, median and worst {cohort} case by {model.regions[0]} Dice with TTA."
        plot_ranked_cases(path(f"cases_{cohort}.png", caption), panels, f"{cohort}, {model.regions[0]}{note}")
    return plots


# ------------------------------------------------------------------------------------------------------------
# The audit
# ------------------------------------------------------------------------------------------------------------


def gather_cohorts(
    config: EvaluationConfig, run: Path, model: TrainedModel, split: dict[str, Any]
) -> dict[str, list[PreparedCase]]:
    """Return the prepared cases of each cohort: validation, internal and, where there is one, external."""
    settings = model.checkpoint["config"]
    data_dir = config.data_dir or settings["data_dir"]
    found = with_reference(find_cases(data_dir, model.modalities, config.slice_channel), data_dir)
    chosen: dict[str, list[Case]] = {
        "validation": cases_of_split(found, split, "validation", data_dir),
        "internal": cases_of_split(found, split, "test", data_dir),
    }
    external_dir = config.external_dir
    demo_external = Path(data_dir).with_name("phantom_external")
    if external_dir is None and model.checkpoint["data_kind"] == "phantom" and demo_external.is_dir():
        external_dir = str(demo_external)
    if external_dir is not None:
        external = find_cases(external_dir, model.modalities, config.slice_channel)
        chosen["external"] = with_reference(external, external_dir)
    print(f"auditing {run}: " + ", ".join(f"{len(cases)} {cohort} cases" for cohort, cases in chosen.items()))
    return {
        cohort: prepare_cases(cases, model.modalities, model.regions, config.cache_dir)
        for cohort, cases in chosen.items()
    }


def main(config: EvaluationConfig) -> None:
    """Audit a run and write its numbers, plots and report; or compare two that were audited."""
    if config.compare:
        compare_runs(config.compare, config.output, config.seed)
        return
    set_seed(config.seed)
    run = Path(config.run) if config.run else newest_run(Path("results"))
    model = load_model(run / "best.pt", choose_device(config.device), config.amp)
    split = read_split(run / "split.json")
    if split["sha256"] != model.checkpoint["split_sha256"]:
        raise InputError(
            f"{run / 'split.json'}: not the split the checkpoint was trained with; restore the run's own."
        )
    cohorts = gather_cohorts(config, run, model, split)
    seen = model.checkpoint["seen"]
    leakage = pd.concat(
        [find_leakage(cohort, cases, seen) for cohort, cases in cohorts.items() if cohort != "validation"]
    )
    folder = Path(config.output) if config.output else run / "evaluation"
    write_atomically(folder / "leakage.csv", lambda target: leakage.to_csv(target, index=False))
    for cohort in cohorts:
        if cohort != "validation":
            known = int((leakage["cohort"] == cohort).sum())
            print(f"{cohort}: {len(cohorts[cohort])} cases, {known} of them seen in training or validation")
    refuse_seen(leakage, config.allow_seen)

    tables, counts, bins = [], {}, {}
    seen_ids = set(leakage["case"])
    for cohort, cases in cohorts.items():
        table, counts[cohort], bins[cohort] = evaluate_cohort(
            model, cohort, cases, seen_ids, config.batch_size
        )
        tables.append(table)
        unseen = table[~table["seen_in_training"]]
        if cohort == "external" and 0 < len(unseen) < len(table):
            tables.append(unseen.assign(cohort="external_unseen"))
    rows = pd.concat(tables, ignore_index=True)
    write_atomically(folder / "metrics_per_case.csv", lambda target: rows.to_csv(target, index=False))
    summary = {
        "data_kind": model.checkpoint["data_kind"],
        "includes_seen_cases": bool(len(leakage)),
        "averaged_over": "Dice per case on the native grid, mean over cases; ci95 by bootstrap over patients",
        "cohorts": summarise_all(rows, model.regions, config.seed),
        "calibration": summarise_bins(model, bins["validation"]),
        "postprocessing": model.checkpoint.get("postprocessing"),
        "threshold": dict(zip(model.regions, model.thresholds, strict=True)),
        "checkpoint_sha256": file_sha256(run / "best.pt"),
        "split_sha256": split["sha256"],
        "versions": describe_versions(),
        "hardware": describe_machine(model.device),
        "command": command_line(),
        "settings": dataclasses.asdict(config),
    }
    write_json(folder / "summary.json", summary)
    print(format_table(summary))
    plots = draw_plots(folder, run, model, rows, counts, cohorts, summary, config.batch_size)
    write_report(folder / "report.html", run, summary, rows, leakage, plots)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_command(
        main, EvaluationConfig, "Audit a trained run on its held-out test cases and on an external cohort."
    )
