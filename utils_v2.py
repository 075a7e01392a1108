"""The hybrid focal + Dice loss (on logits) and the metrics (on bool masks)."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor, nn

HD95_ONE_EMPTY_MM = 374.0  # official BraTS value where exactly one of the two masks is empty
THRESHOLDS = np.round(np.arange(0.05, 0.951, 0.05), 2)  # swept on validation
AT_HALF = int(np.argmin(abs(THRESHOLDS - 0.5)))  # the one that training itself looks at


# ------------------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------------------


class HybridFocalDiceLoss(nn.Module):
    """Weighted sum of the focal and the soft Dice loss on logits, per region, then the mean over regions.

    `logits` and `target` are (N, R, H, W); `target` holds 0 and 1 (bool or any number type). The soft Dice
    counts are pooled over the batch, so slices without tumour act as false-positive penalty and not as a Dice
    of 0 or 1. All arithmetic is float32 whatever autocast says; value and gradient are finite for empty
    masks, full masks and logits of any finite size. Raises ValueError where the shapes differ. `pool` sums
    those counts, (2, R), over the processes that share a batch; None where there is one.

    Focal: Lin et al. 2017 (arXiv 1708.02002), equation 5. Soft Dice: Milletari et al. 2016 (arXiv
    1606.04797).
    """

    def __init__(
        self,
        focal_weight: float = 1.0,
        dice_weight: float = 1.0,
        focal_alpha: float = 0.5,
        focal_gamma: float = 2.0,
        smooth: float = 1.0,
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.focal_weight = focal_weight
        self.dice_weight = dice_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.smooth = smooth
        self.pool = pool

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss; see the class for shapes and ranges."""
        if logits.shape != target.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} differ in shape")
        with torch.autocast(logits.device.type, enabled=False):
            logits, target = logits.float(), target.float()
            return self.focal_weight * self.focal(logits, target) + self.dice_weight * self.dice(
                logits, target
            )

    def focal(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over pixels of 2 alpha_t (1 - p_t)^gamma (-log p_t); the 2 makes alpha 0.5 weigh by 1."""
        # torchvision takes longer to import than torch, and of all commands only training needs it
        from torchvision.ops import sigmoid_focal_loss

        return 2 * sigmoid_focal_loss(logits, target, self.focal_alpha, self.focal_gamma, reduction="mean")

    def dice(self, logits: Tensor, target: Tensor) -> Tensor:
        """1 - soft Dice over the whole batch, per region, then the mean over regions."""
        probability = torch.sigmoid(logits)
        overlap = (probability * target).sum((0, 2, 3))  # (R,)
        total = probability.sum((0, 2, 3)) + target.sum((0, 2, 3))  # (R,)
        if self.pool is not None:
            overlap, total = self.pool(torch.stack((overlap, total)))
        return (1 - (2 * overlap + self.smooth) / (total + self.smooth)).mean()


# ------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of bool masks, reference first
# ------------------------------------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """Voxels of two masks: in both, in the prediction alone, in the reference alone."""

    tp: int
    fp: int
    fn: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 where both masks are empty."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if any(self) else 1.0

    @property
    def precision(self) -> float:
        """TP / (TP + FP); NaN where nothing is predicted."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else float("nan")

    @property
    def recall(self) -> float:
        """TP / (TP + FN); NaN where the reference is empty."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else float("nan")


def check_masks(reference: np.ndarray, prediction: np.ndarray) -> None:
    """Raise ValueError where two masks differ in shape or are not bool."""
    if reference.shape != prediction.shape:
        raise ValueError(f"reference {reference.shape} and prediction {prediction.shape} differ in shape")
    if reference.dtype != np.bool_ or prediction.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {reference.dtype} and {prediction.dtype}")


def count_overlap(reference: np.ndarray, prediction: np.ndarray) -> Overlap:
    """Return the overlap of two bool masks of any one shape."""
    check_masks(reference, prediction)
    tp = int(np.count_nonzero(reference & prediction))
    return Overlap(tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp)


def dice_score(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two bool masks of any one shape: 1 where both are empty, 0 where exactly one is."""
    return count_overlap(reference, prediction).dice


def overlap_at_thresholds(
    probability: np.ndarray, reference: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """Return TP, FP and FN of `probability >= t` for each of the ascending thresholds, shape (T, 3) int64.

    `probability` float32 and `reference` bool of one shape. Two histograms stand in for a pass over the
    voxels per threshold; the counts equal those of `count_overlap` at each. Raises ValueError where a
    probability is not finite, as a histogram would leave it out and both masks would look empty.
    """
    if not np.isfinite(probability).all():
        raise ValueError("probabilities are not finite")
    edges = np.concatenate([[-np.inf], np.asarray(thresholds, np.float32), [np.inf]])
    inside = np.histogram(probability[reference], edges)[0]
    outside = np.histogram(probability[~reference], edges)[0]
    tp = inside[::-1].cumsum()[::-1][1:]  # voxels of the reference at or above each threshold
    fp = outside[::-1].cumsum()[::-1][1:]
    return np.stack([tp, fp, np.count_nonzero(reference) - tp], axis=1)


def choose_thresholds(dice: np.ndarray) -> list[float]:
    """Return a threshold per region from Dice (cases, R, len(THRESHOLDS)) of validation cases.

    The highest mean over a few cases is highest by chance: among the thresholds behind it by no more than one
    standard error of the paired difference (Breiman et al. 1984, Classification and Regression Trees, 3.4.3),
    the one next to 0.5 is taken, at which training looks, and of two the one with the higher mean. One case
    has no standard error, and 0.5 stays.
    """
    chosen = []
    distance = np.round(abs(THRESHOLDS - 0.5), 2)
    for of_region in dice.transpose(1, 0, 2):  # (cases, T)
        mean = of_region.mean(0)
        behind = of_region[:, [mean.argmax()]] - of_region  # (cases, T)
        error = behind.std(0, ddof=1) / np.sqrt(len(behind)) if len(behind) > 1 else np.inf
        allowed = np.flatnonzero(behind.mean(0) <= error)
        nearest = allowed[np.lexsort((-mean[allowed], distance[allowed]))[0]]
        chosen.append(float(THRESHOLDS[nearest]))
    return chosen


# Marching-cubes surface of the 2 x 2 x 2 voxels around a lattice point: the triangles' area vectors, as
# absolute components in eighths of a unit face, for one member of each class of the 256 neighbourhoods.
# Corner (z, y, x) has bit 7 - (4z + 2y + x). Rotations, mirrors and swapping inside for outside give all the
# others.
_SURFEL_CLASSES: dict[int, list[tuple[int, int, int]]] = {
    0b00000001: [(1, 1, 1)],
    0b00000011: [(2, 2, 0)] * 2,
    0b00000110: [(1, 1, 1)] * 2,
    0b00000111: [(1, 1, 1), (2, 2, 2), (4, 0, 0)],
    0b00001111: [(4, 0, 0)] * 2,
    0b00010110: [(1, 1, 1)] * 3,
    0b00010111: [(1, 1, 1)] * 2 + [(2, 2, 2)] * 2,
    0b00011000: [(1, 1, 1)] * 2,
    0b00011001: [(1, 1, 1)] + [(0, 2, 2)] * 2,
    0b00011011: [(1, 1, 1), (3, 3, 3), (0, 2, 2), (2, 0, 2)],
    0b00011110: [(1, 1, 1)] * 2 + [(2, 2, 2), (4, 0, 0)],
    0b00111100: [(2, 2, 0)] * 4,
    0b01101001: [(1, 1, 1)] * 4,
}
_CORNER_BITS = np.array([128, 64, 32, 16, 8, 4, 2, 1]).reshape(2, 2, 2)


@functools.lru_cache(maxsize=64)
def surfel_area_table(spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Return the surface area in mm2 of each of the 256 neighbourhood codes, shape (256,)."""
    dz, dy, dx = spacing_mm
    face_mm2 = np.array([dy * dx, dz * dx, dz * dy])
    area = np.zeros(256)
    for code, triangles in _SURFEL_CLASSES.items():
        corners = (code & _CORNER_BITS) > 0  # (2, 2, 2)
        for axes in itertools.permutations(range(3)):
            vectors = np.array(triangles)[:, axes] / 8 * face_mm2  # (T, 3)
            value = float(np.linalg.norm(vectors, axis=1).sum())
            for mirrored in itertools.product((1, -1), repeat=3):
                turned = corners.transpose(axes)[tuple(slice(None, None, step) for step in mirrored)]
                index = int((turned * _CORNER_BITS).sum())
                area[index] = area[255 - index] = value
    return area


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the slices of the smallest box around a bool mask, any number of axes, not empty."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        # the first axis cuts most away; each further one looks only into what is left
        rest = tuple(other for other in range(mask.ndim) if other != axis)
        present = np.flatnonzero(mask[tuple(box)].any(rest))
        box.append(slice(int(present[0]), int(present[-1]) + 1))
    return tuple(box)


def surface_elements(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (lattice points (S, 3) int64, neighbourhood code (S,) uint8) of a bool mask's surface.

    A lattice point is a corner where eight voxels meet; it belongs to the surface where they are neither all
    inside nor all outside. The mask (D, H, W) must not be empty.
    """
    box = bounding_box(mask)
    codes = np.pad(mask[box], 1).view(np.uint8)
    for axis, bits in ((2, 1), (1, 2), (0, 4)):  # two bits along x, then four over y and x, then eight
        before, after = (
            codes[tuple(part if i == axis else slice(None) for i in range(3))]
            for part in (slice(-1), slice(1, None))
        )
        codes = (before << np.uint8(bits)) | after
    points = np.argwhere(codes + np.uint8(1) > 1)  # neither 0 nor 255
    return points + [edge.start for edge in box], codes[tuple(points.T)]


def nearest_distances_mm(points: np.ndarray, others: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the distance in mm of each lattice point (S, 3) to the nearest of the others (T, 3), both int64.

    Exact. Where two axes have one spacing, a point's squared distance to the others of one plane of these
    axes comes from the plane's distance transform (Felzenszwalb and Huttenlocher 2012, in OpenCV), and the
    least over all planes is taken for the points alone, not for every voxel. Else a k-d tree is asked, which
    is slower the farther apart the two sets are.
    """
    spacing = np.asarray(spacing_mm, float)
    across = next((axis for axis in range(3) if len(set(np.delete(spacing, axis))) == 1), None)
    if across is None:
        nearest = KDTree(others * spacing).query(points * spacing)[1]
        return np.sqrt((((points - others[nearest]) * spacing) ** 2).sum(1))
    axes = [across, *(axis for axis in range(3) if axis != across)]
    start = np.minimum(points.min(0), others.min(0))
    points, others = (points - start)[:, axes], (others - start)[:, axes]
    height, width = np.maximum(points.max(0), others.max(0))[1:] + 1
    pixels = points[:, 1] * width + points[:, 2]  # (S,) where a point lies in every plane
    squares = np.full(len(points), np.inf)  # (S,) mm2
    for z in np.unique(others[:, 0]):
        plane = np.ones((height, width), np.uint8)
        plane[tuple(others[others[:, 0] == z, 1:].T)] = 0
        within = cv2.distanceTransform(plane, cv2.DIST_L2, cv2.DIST_MASK_PRECISE).ravel()[pixels]
        # a squared distance in pixels is a whole number, which float32 holds but for its last digits
        candidates = np.rint(within.astype(float) ** 2) * spacing[axes[1]] ** 2
        np.minimum(squares, candidates + ((points[:, 0] - z) * spacing[across]) ** 2, out=squares)
    return np.sqrt(squares)


def surface_distances_mm(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return (distance in mm, area in mm2) of every surface element, reference to prediction and back.

    Both masks (D, H, W) bool and not empty. Definition: Nikolov et al. 2018 (arXiv 1809.04430).
    """
    area = surfel_area_table(tuple(spacing_mm))
    (points, codes), (others, other_codes) = (surface_elements(mask) for mask in (reference, prediction))
    there = nearest_distances_mm(points, others, spacing_mm)
    back = nearest_distances_mm(others, points, spacing_mm)
    return (there, area[codes]), (back, area[other_codes])


def surface_metrics(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 1.0
) -> tuple[float, float]:
    """Return (HD95 in mm, normalised surface Dice) of two bool masks from one pass over their surfaces.

    Masks (D, H, W) bool, spacing (D, H, W) in mm. HD95: see `hd95`. Surface Dice: the share of the two
    surfaces, by area, that lies within the tolerance of the other one, 0 to 1. It is 1 where both masks are
    empty, 0 where exactly one is. Nikolov et al. 2018 (arXiv 1809.04430), equation 4, with surfaces as the
    surface-distance package has them.
    """
    check_masks(reference, prediction)
    if not reference.any() or not prediction.any():
        return (0.0, 1.0) if reference.any() == prediction.any() else (HD95_ONE_EMPTY_MM, 0.0)
    surfaces = surface_distances_mm(reference, prediction, spacing_mm)
    # 1e-9 keeps rounding from deciding ties: exactly 95 % of the area, a distance equal to the tolerance
    percentiles = []
    for distance, area in surfaces:
        order = np.argsort(distance, kind="stable")
        cumulative_area = np.cumsum(area[order])
        position = int(np.searchsorted(cumulative_area / cumulative_area[-1], 0.95 - 1e-9))
        percentiles.append(float(distance[order][position]))
    within = sum(float(area[distance <= tolerance_mm + 1e-9].sum()) for distance, area in surfaces)
    return max(percentiles), within / sum(float(area.sum()) for _, area in surfaces)


def hd95(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance in mm of two bool masks (D, H, W) with voxel spacing (D, H, W) in mm.

    The larger of the two directed 95th percentiles, each weighted by surface area, as the surface-distance
    package and the BraTS evaluation have it. 0 where both masks are empty, 374 where exactly one is.
    """
    return surface_metrics(reference, prediction, spacing_mm)[0]
