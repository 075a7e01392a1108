"""Pictures of a run and of its cases: training curves, overlays, slice balance; what all plots share."""

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


def tidy(axes: mpl.axes.Axes) -> None:
    """Take off the upper and right frame and draw a quiet grid."""
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
        tidy(axes)
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
    tidy(axes)
    save_figure(figure, path)
