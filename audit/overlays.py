"""Slices of cases with the outlines of their masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from audit.plots import REGION_COLOURS, save_figure
from audit.results import CasePicture

REFERENCE_COLOUR, PREDICTION_COLOUR = "#56b4e9", "#f0a014"  # as in viewer.js; told apart by the colour-blind
BATCH_SHOWN, BATCH_TINT = 16, 0.25


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
    note = f"prediction: {', '.join(regions)}" if len(rows) else f"no {', '.join(regions)} predicted"
    figure.suptitle(f"{case_id}, {note}", color="white", fontsize=10, parse_math=False)
    save_figure(figure, path)


def take_picture(
    intensities: np.ndarray, reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> CasePicture:
    """Return the slice with most tumour of the reference, or of the prediction where the reference is empty.

    All three are (D, H, W), the masks bool. Where both are empty it is the middle slice.
    """
    area = (reference if reference.any() else prediction).sum((1, 2))
    z = int(area.argmax()) if area.any() else len(area) // 2
    window = grey_window(np.asarray(intensities, np.float32))
    # copies, so that the volume can be let go
    pixels, present, predicted = (array[z].copy() for array in (intensities, reference, prediction))
    return CasePicture(z, pixels, present, predicted, window, tuple(spacing_mm))


def plot_ranked_cases(path: Path, pictures: Mapping[str, CasePicture], title: str) -> None:
    """Draw cases side by side, each under its name, with reference and prediction outlines."""
    figure = Figure(figsize=(4.2 * len(pictures), 4.9), layout="constrained", facecolor="black")
    grid = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (name, picture) in zip(grid, pictures.items(), strict=True):
        contours = [(picture.reference, REFERENCE_COLOUR), (picture.prediction, PREDICTION_COLOUR)]
        pixels = picture.pixels.astype(np.float32)
        show_slice(axes, pixels, picture.window, contours, picture.spacing_mm)
        axes.set_title(f"{name}\nslice {picture.z}", color="white", fontsize=9, parse_math=False)
    handles = [
        mpl.lines.Line2D([], [], color=colour, label=label)
        for colour, label in ((REFERENCE_COLOUR, "reference"), (PREDICTION_COLOUR, "prediction"))
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor="white", fontsize=9
    )
    figure.suptitle(title, color="white", fontsize=11)
    save_figure(figure, path)


def plot_batch(path: Path, slabs: Tensor, targets: Tensor, context: int, note: str) -> None:
    """Draw up to 16 slabs of a batch as the network sees them, augmented, with their targets.

    `slabs` (N, C*K, S, S) z-scores with K = 2 * context + 1, `targets` (N, R, S, S) of 0 and 1. Shown is the
    middle slice of the first modality, all slabs in one grey window, and each region tinted and outlined.
    """
    # torchvision takes longer to import than torch, and of all commands only training needs it
    from torchvision.utils import draw_segmentation_masks, make_grid

    slices = slabs[:BATCH_SHOWN, context].numpy()  # (n, S, S): the slices of a modality lie together
    low, high = grey_window(slices)
    grey = torch.from_numpy(255 * np.clip((slices - low) / (high - low), 0, 1)).to(torch.uint8)
    masks = targets[:BATCH_SHOWN] > 0  # (n, R, S, S)
    outlines = masks & (functional.max_pool2d((~masks).float(), 3, 1, 1) > 0)  # beside a pixel outside
    colours = list(REGION_COLOURS.values()) if masks.shape[1] > 1 else [REFERENCE_COLOUR]
    tiles = list(grey[:, None].expand(-1, 3, -1, -1))
    for index, colour in enumerate(colours[: masks.shape[1]]):  # one by one, as torchvision blackens overlaps
        for strength, shapes in ((BATCH_TINT, masks), (1.0, outlines)):
            tiles = [
                draw_segmentation_masks(tile, shape[index], strength, colour)
                for tile, shape in zip(tiles, shapes, strict=True)
            ]
    grid = make_grid(tiles, nrow=4, padding=2, pad_value=48).permute(1, 2, 0).numpy()
    height = 9 * grid.shape[0] / grid.shape[1] + 0.5  # and room for the note
    figure = Figure(figsize=(9, height), layout="constrained", facecolor="black")
    axes = figure.subplots()
    axes.imshow(grid)
    axes.set_axis_off()
    figure.suptitle(note, color="white", fontsize=10)
    save_figure(figure, path)
