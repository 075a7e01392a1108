"""The master audit: internal test, external test, leakage, plots and a report.

    python final_evaluation_v2.py                                       the newest run in results/
    python final_evaluation_v2.py --run results/RUN --external-dir data/BraTS2019
    python final_evaluation_v2.py --compare results/RUN_A results/RUN_B
    torchrun --nproc-per-node 2 -- final_evaluation_v2.py --run results/RUN    the same, cases shared by ranks

The headline is Dice per case on the native grid, then the mean over cases, with a bootstrap 95 % interval
over patients. Whatever else is called Dice stands beside it under its own name. Of several ranks each decodes
and predicts its share of the cases; the main one searches for leakage, sums up, draws and writes.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from cache_v2 import CACHE_GB, PreparedCase, prepare_by_shares
from cases_v2 import Case, with_reference
from compare_v2 import compare_runs
from dataset_balance_v2 import cases_of_split, read_split
from distributed_v2 import (
    from_main,
    gather_shares,
    is_main,
    join_ranks,
    local_device,
    share_of,
    with_one_voice,
    world_size,
)
from inference_v2 import VIEWS, TrainedModel, load_model, predict_views, predict_volume, threshold_regions
from layouts_v2 import LayoutName, describe_cases, find_cases, find_cases_of_run
from leakage_v2 import find_seen, identify_cases, identity_of_ids, unpack_identities
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
from volumes_v2 import brain_mask

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
    layout: LayoutName = option("auto", "layout of --external-dir; the run's own cases keep that of the run")
    mapping: str | None = option(
        None, "CSV sheet of ids of --external-dir, beside those found with the cases"
    )
    cache_gb: float = option(CACHE_GB, "largest size of that folder in GB; what is unused longest goes first")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR, of --external-dir")
    batch_size: int = option(16, "slabs a forward pass")
    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "where to compute")
    amp: bool = option(True, "mixed precision where the device has it")
    seed: int = option(0, "seed of the bootstrap")


# ------------------------------------------------------------------------------------------------------------
# Leakage
# ------------------------------------------------------------------------------------------------------------


def list_leakage(
    config: EvaluationConfig,
    model: TrainedModel,
    chosen: dict[str, list[Case]],
    cohorts: dict[str, list[PreparedCase]],
) -> pd.DataFrame:
    """Return the rows of `find_seen` for the internal and the external cohort.

    Training cases are known by the identities in the checkpoint; where it is older than these, they are read
    from the run's data.
    """
    known = unpack_identities(model.checkpoint)
    if known is None:
        print("the checkpoint holds no fingerprints; reading those of the training cases from the data")
        known = identify_cases([*chosen["train"], *chosen["validation"]], model.modalities, config.cache_dir)
        names = {one.case_id for one in known}
        gone = [entry for entry in model.checkpoint["seen"] if entry[0] not in names]
        known += [identity_of_ids(case_id, patient_id) for case_id, patient_id, *_ in gone]
        if gone:
            print(f"{len(gone)} training case(s), first {gone[0][0]}, are not there and known by id alone")
    tables = []
    for cohort in cohorts:
        if cohort == "validation":
            continue
        prints = {case.case_id: case.fingerprint for case in cohorts[cohort]}
        tested = identify_cases(chosen[cohort], model.modalities, config.cache_dir, prints)
        tables.append(find_seen(cohort, tested, known))
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def count_seen(cohorts: dict[str, list[PreparedCase]], leakage: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return {cohort: {"cases", "seen", "unseen"}} of the internal and the external cohort."""
    counts = {}
    for cohort, cases in cohorts.items():
        if cohort != "validation":
            seen = int((leakage["cohort"] == cohort).sum())
            counts[cohort] = {"cases": len(cases), "seen": seen, "unseen": len(cases) - seen}
    return counts


def refuse_seen(seen: dict[str, dict[str, int]], leakage: pd.DataFrame, allow_seen: bool) -> None:
    """Raise InputError where an internal case was seen or no external one is unseen, unless allowed.

    An external cohort of which some were seen goes on: it is reported as a whole, marked, and without them.
    """
    for cohort, count in () if allow_seen else seen.items():
        if not count["seen"] or (cohort == "external" and count["unseen"]):
            continue
        first = leakage[leakage["cohort"] == cohort].iloc[0]
        example = f"{first['case']} is {first['training_case']} by {first['evidence']}"
        if cohort == "external":
            raise InputError(
                f"--external-dir: each of its {count['cases']} cases was seen in training or validation "
                f"({example}), so they are not external; give another cohort, train with --hold-out-dir, or "
                f"pass --allow-seen to mark the output."
            )
        raise InputError(
            f"{count['seen']} {cohort} case(s) to be tested were seen in training or validation ({example}); "
            f"take them out, or pass --allow-seen to audit them and mark the output."
        )


def search_leakage(
    config: EvaluationConfig,
    folder: Path,
    model: TrainedModel,
    chosen: dict[str, list[Case]],
    cohorts: dict[str, list[PreparedCase]],
) -> tuple[pd.DataFrame, dict[str, dict[str, int]]]:
    """Return the rows of leakage.csv and the counts of `count_seen`; write and print them, then refuse."""
    leakage = list_leakage(config, model, chosen, cohorts)
    write_atomically(folder / "leakage.csv", lambda target: leakage.to_csv(target, index=False))
    seen = count_seen(cohorts, leakage)
    for cohort, count in seen.items():
        print(
            f"{cohort}: {count['cases']} cases, {count['seen']} of them seen in training or validation, "
            f"{count['unseen']} unseen"
        )
    refuse_seen(seen, leakage, config.allow_seen)
    return leakage, seen


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


class CaseAudit(NamedTuple):
    """What is measured of one case."""

    rows: list[dict[str, Any]]  # one per mode and region
    counts: dict[str, np.ndarray]  # per mode TP, FP and FN at each of THRESHOLDS (R, T, 3)
    bins: dict[str, np.ndarray]  # per mode `reliability_counts` of the brain's voxels (R, B, 3)


def evaluate_case(model: TrainedModel, cohort: str, case: PreparedCase, batch_size: int) -> CaseAudit:
    """Predict and measure a case; its bins are counted in validation and 0 elsewhere.

    Plain is the identity view, TTA the mean of all three; where the checkpoint has post-processing, plain_raw
    and tta_raw are the masks before it.
    """
    rows = []
    counts = {mode: np.zeros((len(model.regions), len(THRESHOLDS), 3), np.int64) for mode in MODES}
    bins = {mode: np.zeros((len(model.regions), len(CALIBRATION_EDGES) - 1, 3)) for mode in MODES}
    started = time.perf_counter()
    volume = case.volume
    views = predict_views(model, volume, case.brain_voxels, tuple(VIEWS), batch_size)
    seconds = time.perf_counter() - started
    reference = case.reference
    brain = brain_mask(volume[0].astype(np.float32)) if cohort == "validation" else None
    for mode, probabilities in (("plain", views[0]), ("tta", views.mean(0))):
        for index in range(len(model.regions)):
            counts[mode][index] = overlap_at_thresholds(probabilities[index], reference[index], THRESHOLDS)
            if brain is not None:
                bins[mode][index] = reliability_counts(probabilities[index][brain], reference[index][brain])
        for name, masks in masks_by_mode(model, mode, probabilities, case.spacing_mm).items():
            for index, region in enumerate(model.regions):
                row = {"cohort": cohort, "case": case.case_id, "patient": case.patient_id}
                row |= {"region": region, "mode": name}
                row |= measure_case(reference[index], masks[index], case.spacing_mm)
                rows.append(row | {"seconds_three_views": round(seconds, 3)})
    return CaseAudit(rows, counts, bins)


def evaluate_cohort(
    model: TrainedModel, cohort: str, cases: Sequence[PreparedCase], seen: set[str], batch_size: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the rows of all cases, and per mode their counts and bins pooled over the cohort.

    Ranks share the cases; each gets what was measured of all.
    """
    progress = tqdm(share_of(cases), desc=f"auditing {cohort}", unit="case", leave=False)
    audits = gather_shares([evaluate_case(model, cohort, case, batch_size) for case in progress])
    # pooled in the order of the cases, not rank by rank: bins hold sums of floats, which depend on the order
    counts = {mode: sum(audit.counts[mode] for audit in audits) for mode in MODES}
    bins = {mode: sum(audit.bins[mode] for audit in audits) for mode in MODES}
    table = pd.DataFrame([row for audit in audits for row in audit.rows])
    table.insert(table.columns.get_loc("mode") + 1, "seen_in_training", table["case"].isin(seen))
    return table, counts, bins


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
            volume, reference = case.volume, case.reference[0]
            probabilities = predict_volume(model, volume, case.brain_voxels, batch_size=batch_size)
            prediction = masks_by_mode(model, "tta", probabilities, case.spacing_mm)["tta"][0]
            dice = dice_from_counts(*count_overlap(reference, prediction))
            title = f"{rank}: {case_id}, Dice {dice:.3f}"
            panels.append((title, volume[0], reference, prediction, case.spacing_mm))
        caption = f"Best, median and worst {cohort} case by {model.regions[0]} Dice with TTA."
        plot_ranked_cases(path(f"cases_{cohort}.png", caption), panels, f"{cohort}, {model.regions[0]}{note}")
    return plots


# ------------------------------------------------------------------------------------------------------------
# The audit
# ------------------------------------------------------------------------------------------------------------


def choose_cohorts(
    config: EvaluationConfig, run: Path, model: TrainedModel, split: dict[str, Any]
) -> dict[str, list[Case]]:
    """Return the cases of validation, internal, external where there is one, and train, if still there."""
    settings = model.checkpoint["config"]
    data_dir = config.data_dir or settings["data_dir"]
    found = with_reference(find_cases_of_run(settings, data_dir), data_dir)
    chosen: dict[str, list[Case]] = {
        "validation": cases_of_split(found, split, "validation", data_dir),
        "internal": cases_of_split(found, split, "test", data_dir),
    }
    external_dir = config.external_dir
    demo_external = Path(data_dir).with_name("phantom_external")
    if external_dir is None and model.checkpoint["data_kind"] == "phantom" and demo_external.is_dir():
        external_dir = str(demo_external)
    if external_dir is not None:
        external = find_cases(
            external_dir, model.modalities, config.slice_channel, config.layout, config.mapping
        )
        print("\n".join(f"external: {line}" for line in describe_cases(external)))
        chosen["external"] = with_reference(external, external_dir)
    train_ids = set(split["train"])
    train = {"train": [case for case in found if case.case_id in train_ids]}
    print(f"auditing {run}: " + ", ".join(f"{len(cases)} {cohort} cases" for cohort, cases in chosen.items()))
    return chosen | train


def main(config: EvaluationConfig) -> None:
    """Audit a run and write its numbers, plots and report; or compare two that were audited."""
    join_ranks()
    if config.compare:
        if is_main():
            compare_runs(config.compare, config.output, config.seed)
        return
    set_seed(config.seed)
    run = from_main(Path(config.run) if config.run else newest_run(Path("results")))
    model = load_model(run / "best.pt", local_device(choose_device(config.device)), config.amp)
    split = read_split(run / "split.json")
    if split["sha256"] != model.checkpoint["split_sha256"]:
        raise InputError(
            f"{run / 'split.json'}: not the split the checkpoint was trained with; restore the run's own."
        )
    chosen = from_main(choose_cohorts(config, run, model, split) if is_main() else None)
    settings = (model.modalities, model.regions, config.cache_dir, config.cache_gb)
    cohorts = {
        cohort: prepare_by_shares(cases, *settings) for cohort, cases in chosen.items() if cohort != "train"
    }
    folder = Path(config.output) if config.output else run / "evaluation"
    leakage, seen = from_main(search_leakage(config, folder, model, chosen, cohorts) if is_main() else None)

    tables, counts, bins = [], {}, {}
    for cohort, cases in cohorts.items():
        seen_ids = set(leakage.loc[leakage["cohort"] == cohort, "case"])
        table, counts[cohort], bins[cohort] = evaluate_cohort(
            model, cohort, cases, seen_ids, config.batch_size
        )
        tables.append(table)
        unseen = table[~table["seen_in_training"]]
        if cohort == "external" and 0 < len(unseen) < len(table):
            tables.append(unseen.assign(cohort="external_unseen"))
    if not is_main():
        return
    rows = pd.concat(tables, ignore_index=True)
    write_atomically(folder / "metrics_per_case.csv", lambda target: rows.to_csv(target, index=False))
    summary = {
        "data_kind": model.checkpoint["data_kind"],
        "includes_seen_cases": bool(len(leakage)),
        "seen_in_training": seen,
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
        "ranks": world_size(),
        "settings": dataclasses.asdict(config),
    }
    write_json(folder / "summary.json", summary)
    print(format_table(summary))
    plots = draw_plots(folder, run, model, rows, counts, cohorts, summary, config.batch_size)
    write_report(folder / "report.html", run, summary, rows, leakage, plots)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_command(
        with_one_voice(main),
        EvaluationConfig,
        "Audit a trained run on its held-out test cases and on an external cohort. Under torchrun the ranks "
        "share the cases.",
    )
