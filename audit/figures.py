"""The figures of an audit: which there are, under what caption, in the order of the report."""

from pathlib import Path

import pandas as pd

from audit.kinds import kind_of, kind_tested, note_kind
from audit.overlays import plot_ranked_cases, take_picture
from audit.plots import (
    plot_bland_altman,
    plot_curves,
    plot_dice_against_uncertainty,
    plot_dice_against_volume,
    plot_dice_per_case,
    plot_precision_recall,
    plot_reliability,
    plot_tta_gain,
    save_chart,
)
from audit.results import AuditResults, CasePicture, CaseVolumes, headline_mode, rank_cases
from runtime.errors import InputError
from runtime.log import log
from runtime.tables import read_columns
from utils_v2 import THRESHOLDS

CAPTIONS = {
    "dice_per_case.png": "Dice of each test case, sorted, with TTA; the band is the bootstrap 95 % interval "
    "of the mean (none is stated of fewer than six patients).",
    "dice_against_volume.png": "Dice against the tumour volume of the reference, with TTA.",
    "volume_bland_altman.png": "Volume error: prediction minus reference against their mean, with TTA; lines "
    "at the mean and the limits of agreement (mean and 1.96 SD over cases).",
    "tta_gain.png": "What TTA changes: Dice with TTA minus Dice without, per test case.",
    "dice_against_uncertainty.png": "Dice against uncertainty per test case: the SD of the probability over "
    "the three views of TTA, mean over the predicted voxels, or the brain's where nothing is predicted (open "
    "marks).",
    "precision_recall.png": "Precision and recall over thresholds, voxels pooled, with TTA; the ring is the "
    "threshold used. Each region by itself, before nesting and post-processing.",
    "calibration.png": "Calibration on validation: share of reference tumour among the brain's voxels of "
    "each probability, and how many voxels there are (voxels pooled, before post-processing).",
    "training_curves.png": "Training: loss, Dice and learning rate over epochs.",
}


# What the captions say otherwise of a run of folds.
FOLD_WORDS = {
    "dice_against_uncertainty.png": ("views of TTA", "views of TTA (external: over the networks)"),
    "precision_recall.png": ("threshold used", "mean of the folds' thresholds"),
}
CURVES = ("epoch", "train_loss", "train_dice", "learning_rate")  # columns of log.csv
NEED_NETWORK = ("tta_gain.png", "dice_against_uncertainty.png", "precision_recall.png", "calibration.png")


def draw_figures(results: AuditResults, folder: Path) -> dict[str, Path]:
    """Draw every figure into `folder` and return {caption: path} in the order of the report."""
    summary, cohorts = results.summary, results.summary["cohorts"]
    note = note_kind(kind_tested(summary))
    tested = results.rows[results.rows["cohort"] != "validation"]
    mode = headline_mode(results.rows)
    captions = {
        name: caption if mode == "tta" else without_tta(caption) for name, caption in CAPTIONS.items()
    }
    if summary.get("folds"):
        captions |= {name: captions[name].replace(*words) for name, words in FOLD_WORDS.items()}
    log_path = results.run / "log.csv"
    epochs = read_epochs(log_path)
    if len(epochs):
        title = results.run.name + note_kind(summary["data_kind"])
        plot_curves(folder / "training_curves.png", epochs, title, save_chart)
    else:
        del captions["training_curves.png"]
    plot_dice_per_case(folder / "dice_per_case.png", tested, cohorts, note)
    plot_dice_against_volume(folder / "dice_against_volume.png", tested, note)
    plot_bland_altman(folder / "volume_bland_altman.png", tested, cohorts, note)
    if mode == "tta":
        plot_tta_gain(folder / "tta_gain.png", tested, cohorts, note)
        path = folder / "dice_against_uncertainty.png"
        if "uncertainty" in tested:
            plot_dice_against_uncertainty(path, tested, cohorts, note, bool(summary.get("folds")))
        else:
            del captions[path.name]
        path = folder / "precision_recall.png"
        plot_precision_recall(path, results.counts, summary["threshold"], THRESHOLDS, note)
        plot_reliability(folder / "calibration.png", summary["calibration"], note)
    else:
        for name in NEED_NETWORK:
            del captions[name]
    region = results.rows["region"].iloc[0]
    for cohort in tested["cohort"].unique():
        if cohort == "external_unseen":  # its cases are in external
            continue
        ranked = rank_cases(results.rows, region, cohort)
        panels = {
            f"{rank}: {case}, Dice {dice:.3f}": picture_first_region(results.open_case(cohort, case))
            for rank, (case, dice) in ranked.items()
        }
        title = f"{cohort}, {region}{note_kind(kind_of(summary, cohort))}"
        plot_ranked_cases(folder / f"cases_{cohort}.png", panels, title)
        names = {1: "The", 2: "Best and worst", 3: "Best, median and worst"}[len(ranked)]
        caption = f"{names} {cohort} case by {region} Dice, with TTA."
        captions[f"cases_{cohort}.png"] = caption if mode == "tta" else without_tta(caption)
    return {caption: folder / name for name, caption in captions.items()}


def read_epochs(path: Path) -> pd.DataFrame:
    """Return a run's log.csv, nothing where it is missing or damaged: the audit does without curves."""
    if not path.exists():
        return pd.DataFrame()
    try:
        scores = [name for name in read_columns(path, "") if name.startswith("validation_dice_")]
        return read_columns(path, "", numbers=(*CURVES, *scores))
    except InputError as error:
        log.warning("no training curves are drawn: %s", error)
        return pd.DataFrame()


def without_tta(caption: str) -> str:
    """Return a caption for masks that were given and not averaged over views."""
    return caption.replace(", with TTA", "")


def picture_first_region(volumes: CaseVolumes) -> CasePicture:
    """Return `take_picture` of a case's first modality and region."""
    intensities, masks = next(iter(volumes.images.values())), next(iter(volumes.predictions.values()))
    return take_picture(intensities, volumes.reference[0], masks[0], volumes.spacing_mm)
