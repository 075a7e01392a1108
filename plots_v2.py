"""Every picture the project draws: training curves, case overlays, the audit's plots."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from utils_v2 import write_atomically

mpl.use("Agg")  # files only: a terminal without a display is the usual place

REGION_COLOURS = {"WT": "#1f6f8b", "TC": "#d1793a", "ET": "#a43c5b"}
REFERENCE_COLOUR, PREDICTION_COLOUR = "#35e0a1", "#ff4d6d"
GREY = "#8a94a0"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG."""
    write_atomically(path, lambda target: figure.savefig(target, dpi=130))


def _tidy(axes: mpl.axes.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_curves(path: Path, log: pd.DataFrame, title: str) -> None:
    """Draw a run's log: loss, Dice (training slabs and validation cases) and learning rate over epochs."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, dice, rate = figure.subplots(1, 3)
    loss.plot(log["epoch"], log["train_loss"], color="#333c47", marker=".")
    loss.set_ylabel("training loss (focal + Dice)")
    dice.plot(log["epoch"], log["train_dice"], color=GREY, linestyle="--", label="training slabs, pooled")
    for column in log.columns[log.columns.str.startswith("validation_dice_")]:
        region = column.removeprefix("validation_dice_")
        dice.plot(
            log["epoch"],
            log[column],
            color=REGION_COLOURS[region],
            marker=".",
            label=f"{region}, mean over cases",
        )
        kept = log[column].idxmax()
        dice.annotate(
            f"{log[column][kept]:.3f}",
            (log["epoch"][kept], log[column][kept]),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=8,
        )
    dice.set_ylabel("Dice at probability 0.5")
    dice.set_ylim(0, 1)
    dice.legend(frameon=False, loc="lower right", fontsize=8)
    rate.semilogy(log["epoch"], log["learning_rate"], color="#333c47", marker=".", drawstyle="steps-post")
    rate.set_ylabel("learning rate")
    for axes in (loss, dice, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        _tidy(axes)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def show_slice(
    axes: mpl.axes.Axes,
    pixels: np.ndarray,
    window: tuple[float, float],
    contours: Sequence[tuple[np.ndarray, str]],
    spacing_mm: Sequence[float],
) -> None:
    """Draw one slice (H, W) in grey with mask outlines ((H, W) bool, colour), at the true aspect ratio."""
    aspect = spacing_mm[1] / spacing_mm[2]
    axes.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
    for mask, colour in contours:
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set_axis_off()


def grey_window(intensities: np.ndarray) -> tuple[float, float]:
    """Return the display range of a volume: its 1st to 99.7th percentile above the darkest value."""
    brighter = intensities[intensities > intensities.min()]
    if brighter.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(brighter, [1, 99.7])
    return float(min(low, intensities.min() + 0.02 * (high - intensities.min()))), float(high)


def plot_overlay(
    path: Path,
    case_id: str,
    intensities: np.ndarray,
    masks: np.ndarray,
    regions: Sequence[str],
    spacing_mm: Sequence[float],
) -> None:
    """Draw the three slices at a quarter, half and three quarters of a prediction, with its outlines.

    `intensities` (D, H, W) of one modality, `masks` (R, D, H, W) bool. Where nothing is predicted the middle
    slice is drawn and the title says so.
    """
    rows = np.flatnonzero(masks.any((0, 2, 3)))
    slices = (
        sorted({int(rows[int(f * (len(rows) - 1))]) for f in (0.25, 0.5, 0.75)})
        if len(rows)
        else [len(masks[0]) // 2]
    )
    figure = Figure(figsize=(3.4 * len(slices), 3.9), layout="constrained", facecolor="black")
    window = grey_window(intensities)
    for axes, z in zip(np.atleast_1d(figure.subplots(1, len(slices))), slices, strict=True):
        contours = [(mask[z], REGION_COLOURS[r]) for r, mask in zip(regions, masks, strict=True)]
        if len(regions) == 1:
            contours = [(masks[0][z], PREDICTION_COLOUR)]
        show_slice(axes, intensities[z], window, contours, spacing_mm)
        axes.set_title(f"slice {z}", color="white", fontsize=9)
    note = f"prediction: {', '.join(regions)}" if len(rows) else "no tumour predicted"
    figure.suptitle(f"{case_id}, {note}", color="white", fontsize=10)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# The audit's plots: `rows` are per-case rows of metrics_per_case.csv, `cohorts` the summary's part of that
# name
# ------------------------------------------------------------------------------------------------------------

COHORT_COLOURS = {
    "internal": "#1f6f8b",
    "external": "#d1793a",
    "external_unseen": "#7a5195",
    "validation": GREY,
}


def _panels(
    rows: pd.DataFrame, width: float, height: float
) -> tuple[Figure, dict[tuple[str, str], mpl.axes.Axes]]:
    """Return a figure with one panel per (cohort, region): regions down, cohorts across."""
    cohorts, regions = list(rows["cohort"].unique()), list(rows["region"].unique())
    size = (width * len(cohorts), height * len(regions))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(regions), len(cohorts), squeeze=False)
    axes = {(c, r): grid[i][j] for i, r in enumerate(regions) for j, c in enumerate(cohorts)}
    return figure, axes


def plot_dice_per_case(path: Path, rows: pd.DataFrame, cohorts: dict, note: str) -> None:
    """Draw the Dice of each case with TTA, sorted, with the mean and its bootstrap 95 % interval."""
    figure, panels = _panels(rows, 5.2, 3.4)
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == "tta")]
        values = np.sort(chosen["dice"].to_numpy())[::-1]
        summary = cohorts[cohort][region]["tta"]["dice"]
        colour = COHORT_COLOURS[cohort]
        if summary["ci95"]:
            label = "95 % interval of the mean"
            axes.axhspan(*summary["ci95"], color=colour, alpha=0.15, linewidth=0, label=label)
        axes.axhline(summary["mean"], color=colour, linewidth=1.2, label=f"mean {summary['mean']:.3f}")
        axes.axhline(
            summary["median"],
            color=colour,
            linewidth=1,
            linestyle=":",
            label=f"median {summary['median']:.3f}",
        )
        axes.plot(
            np.arange(1, len(values) + 1), values, "o", color=colour, markersize=4 if len(values) > 40 else 6
        )
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.set_xlabel(f"case, best to worst (n = {len(values)})")
        axes.set_ylabel(f"{region} Dice per case")
        axes.set_title(cohort, fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        _tidy(axes)
    figure.suptitle(f"Dice per case, with TTA{note}", fontsize=11)
    save_figure(figure, path)


def plot_dice_against_volume(path: Path, rows: pd.DataFrame, note: str) -> None:
    """Draw Dice with TTA against the reference volume in ml, on a logarithmic axis; empty ones counted."""
    figure, panels = _panels(rows, 5.2, 3.4)
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == "tta")]
        present = chosen["reference_ml"] > 0
        shown = chosen[present]
        axes.scatter(
            shown["reference_ml"], shown["dice"], color=COHORT_COLOURS[cohort], s=26, alpha=0.85, linewidths=0
        )
        for row in shown.nsmallest(2, "dice").itertuples():
            left = row.reference_ml > shown["reference_ml"].median()
            axes.annotate(
                row.case,
                (row.reference_ml, row.dice),
                fontsize=7,
                color="#50585f",
                ha="right" if left else "left",
                textcoords="offset points",
                xytext=(-6 if left else 6, -2),
            )
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks(mpl.ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.set_ylim(-0.02, 1.02)
        empty = int((~present).sum())
        axes.set_xlabel("reference volume in ml" + (f" ({empty} empty left out)" if empty else ""))
        axes.set_ylabel(f"{region} Dice per case")
        axes.set_title(f"{cohort}, n = {len(shown)}", fontsize=10)
        _tidy(axes)
    figure.suptitle(f"Dice against tumour volume, with TTA{note}", fontsize=11)
    save_figure(figure, path)


def plot_precision_recall(
    path: Path,
    counts: dict[str, np.ndarray],
    regions: Sequence[str],
    used: Sequence[float],
    thresholds: np.ndarray,
    note: str,
) -> None:
    """Draw precision against recall over thresholds; `counts` is {cohort: (R, T, 3) pooled TP, FP, FN}."""
    figure = Figure(figsize=(4.8 * len(regions), 4.2), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, len(regions), squeeze=False)[0]):
        for cohort, table in counts.items():
            tp, fp, fn = table[index].T
            precision, recall = tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1)
            style = "--" if cohort == "validation" else "-"
            axes.plot(
                recall, precision, style, color=COHORT_COLOURS[cohort], marker=".", markersize=4, label=cohort
            )
            chosen = int(np.argmin(abs(thresholds - used[index])))
            axes.plot(
                recall[chosen],
                precision[chosen],
                "o",
                markersize=9,
                markerfacecolor="none",
                color=COHORT_COLOURS[cohort],
            )
        axes.set_xlabel("recall, voxels pooled")
        axes.set_ylabel("precision, voxels pooled")
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.01)
        axes.set_title(
            f"{regions[index]}, ring at threshold {used[index]:.2f} (chosen on validation)", fontsize=10
        )
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        _tidy(axes)
    figure.suptitle(f"Precision and recall, with TTA\n{note.strip()}".rstrip(), fontsize=11)
    save_figure(figure, path)


def plot_tta_gain(path: Path, rows: pd.DataFrame, cohorts: dict, note: str) -> None:
    """Draw Dice with TTA minus Dice without per case, sorted, with the mean and its 95 % interval."""
    figure, panels = _panels(rows, 5.2, 3.2)
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region)].pivot(
            index="case", columns="mode", values="dice"
        )
        gain = np.sort((chosen["tta"] - chosen["plain"]).to_numpy())[::-1]
        summary = cohorts[cohort][region]["tta_gain"]
        axes.axhline(0, color="#333c47", linewidth=0.8)
        axes.bar(
            np.arange(1, len(gain) + 1), gain, color=np.where(gain >= 0, "#2a9d74", "#c8553d"), width=0.8
        )
        axes.axhline(summary["mean"], color=COHORT_COLOURS[cohort], linewidth=1.2)
        title = f"{cohort}: mean {summary['mean']:+.4f}"
        if summary["ci95"]:
            axes.axhspan(*summary["ci95"], color=COHORT_COLOURS[cohort], alpha=0.18, linewidth=0)
            title += ", 95 % interval {:+.4f} to {:+.4f}".format(*summary["ci95"])
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.set_xlim(0.4, len(gain) + 0.6)
        axes.set_xlabel(f"case, most to least gain (n = {len(gain)})")
        axes.set_ylabel(f"{region} Dice, TTA - plain")
        _tidy(axes)
    figure.suptitle(f"What test-time augmentation changes{note}", fontsize=11)
    save_figure(figure, path)


def plot_ranked_cases(
    path: Path, panels: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, Sequence[float]]], title: str
) -> None:
    """Draw cases side by side, each at the slice with most tumour, with reference and prediction outlines.

    A panel is (title, intensities (D, H, W), reference (D, H, W) bool, prediction (D, H, W) bool,
    spacing_mm).
    """
    figure = Figure(figsize=(4.2 * len(panels), 4.9), layout="constrained", facecolor="black")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        name, intensities, reference, prediction, spacing_mm = panel
        area = (reference if reference.any() else prediction).sum((1, 2))
        z = int(area.argmax()) if area.any() else len(area) // 2
        contours = [(reference[z], REFERENCE_COLOUR), (prediction[z], PREDICTION_COLOUR)]
        pixels = np.asarray(intensities, np.float32)
        show_slice(axes, pixels[z], grey_window(pixels), contours, spacing_mm)
        axes.set_title(f"{name}\nslice {z}", color="white", fontsize=9)
    handles = [
        mpl.lines.Line2D([], [], color=colour, label=label)
        for colour, label in ((REFERENCE_COLOUR, "reference"), (PREDICTION_COLOUR, "prediction"))
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor="white", fontsize=9
    )
    figure.suptitle(title, color="white", fontsize=11)
    save_figure(figure, path)


def plot_balance(before: pd.Series, after: pd.Series, path: Path) -> None:
    """Draw the share of each slice kind (the series' index) before and after weighting."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(before))
    for offset, shares, label, colour in (
        (-0.2, before, "as stored", GREY),
        (0.2, after, "as drawn", "#1f6f8b"),
    ):
        bars = axes.bar(positions + offset, shares, 0.38, label=label, color=colour)
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=9)
    axes.set_xticks(positions, [f"{kind} slices" for kind in before.index])
    axes.set_ylabel("share of slices")
    axes.set_ylim(0, min(1.1, max(before.max(), after.max()) * 1.2))
    axes.legend(frameon=False)
    _tidy(axes)
    save_figure(figure, path)
