"""Loss, metrics and the run's plumbing: command line, seeds, devices, checkpoints.

Three parts, in this order: the hybrid focal + Dice loss (on logits), the metrics (on bool masks), and what
every command shares. Nothing here knows a network or a file format; no sibling module is imported.
"""

import argparse
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import KDTree
from torch import Tensor, nn

PHANTOM_DESCRIPTION = "DRUnet V2 synthetic phantom"  # header text by which a synthetic file is known
HD95_ONE_EMPTY_MM = 374.0  # official BraTS value where exactly one of the two masks is empty
CHECKPOINT_FORMAT = "drunet-v2/1"
THRESHOLDS = np.round(
    np.arange(0.05, 0.951, 0.05), 2
)  # swept on validation; training itself looks at 0.5 only

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt, from malloc.h


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence naming the file or flag and the remedy."""


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
        signed = logits * (2 * target - 1)  # (N, R, H, W), p_t = sigmoid(signed)
        alpha_t = 2 * (self.focal_alpha * target + (1 - self.focal_alpha) * (1 - target))
        # softplus(-x) = -log sigmoid(x); sigmoid(-x) = 1 - p_t: neither overflows nor takes the log of 0
        return (alpha_t * torch.sigmoid(-signed).pow(self.focal_gamma) * F.softplus(-signed)).mean()

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


def count_overlap(reference: np.ndarray, prediction: np.ndarray) -> tuple[int, int, int]:
    """Return true-positive, false-positive and false-negative voxel counts of two bool masks of one shape."""
    if reference.shape != prediction.shape:
        raise ValueError(f"reference {reference.shape} and prediction {prediction.shape} differ in shape")
    if reference.dtype != np.bool_ or prediction.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {reference.dtype} and {prediction.dtype}")
    overlap = int(np.count_nonzero(reference & prediction))
    return overlap, int(np.count_nonzero(prediction)) - overlap, int(np.count_nonzero(reference)) - overlap


def dice_from_counts(tp: int, fp: int, fn: int) -> float:
    """Dice of voxel counts: 2 TP / (2 TP + FP + FN); 1 where reference and prediction are both empty."""
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0


def dice_score(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two bool masks of any one shape: 1 where both are empty, 0 where exactly one is."""
    return dice_from_counts(*count_overlap(reference, prediction))


def precision(reference: np.ndarray, prediction: np.ndarray) -> float:
    """TP / (TP + FP) of two bool masks; NaN where nothing is predicted."""
    tp, fp, _ = count_overlap(reference, prediction)
    return tp / (tp + fp) if tp + fp else float("nan")


def recall(reference: np.ndarray, prediction: np.ndarray) -> float:
    """TP / (TP + FN) of two bool masks; NaN where the reference is empty."""
    tp, _, fn = count_overlap(reference, prediction)
    return tp / (tp + fn) if tp + fn else float("nan")


def overlap_at_thresholds(
    probability: np.ndarray, reference: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """Return TP, FP and FN of `probability >= t` for each of the ascending thresholds, shape (T, 3) int64.

    `probability` float32 and `reference` bool of one shape. Two histograms stand in for a pass over the
    voxels per threshold; the counts equal those of `count_overlap` at each.
    """
    edges = np.concatenate([[-np.inf], np.asarray(thresholds, np.float32), [np.inf]])
    inside = np.histogram(probability[reference], edges)[0]
    outside = np.histogram(probability[~reference], edges)[0]
    tp = inside[::-1].cumsum()[::-1][1:]  # voxels of the reference at or above each threshold
    fp = outside[::-1].cumsum()[::-1][1:]
    return np.stack([tp, fp, inside.sum() - tp], axis=1)


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

    See `hd95` and `normalised_surface_dice`, each of which is one of the two.
    """
    count_overlap(reference, prediction)  # raises where shapes or types do not fit
    if not reference.any() or not prediction.any():
        return (0.0, 1.0) if reference.any() == prediction.any() else (HD95_ONE_EMPTY_MM, 0.0)
    surfaces = surface_distances_mm(reference, prediction, spacing_mm)
    percentiles = []
    for distance, area in surfaces:
        order = np.argsort(distance, kind="stable")
        share = np.cumsum(area[order])
        # the sum's rounding must not decide where exactly 95 % are reached
        position = int(np.searchsorted(share / share[-1], 0.95 - 1e-9))
        percentiles.append(float(distance[order][position]))
    # nor a distance's whether it is within the tolerance
    within = sum(float(area[distance <= tolerance_mm + 1e-9].sum()) for distance, area in surfaces)
    return max(percentiles), within / sum(float(area.sum()) for _, area in surfaces)


def hd95(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance in mm of two bool masks (D, H, W) with voxel spacing (D, H, W) in mm.

    The larger of the two directed 95th percentiles, each weighted by surface area, as the surface-distance
    package and the BraTS evaluation have it. 0 where both masks are empty, 374 where exactly one is.
    """
    return surface_metrics(reference, prediction, spacing_mm)[0]


def normalised_surface_dice(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 1.0
) -> float:
    """Share of the two surfaces, by area, that lies within the tolerance of the other one: 0 to 1.

    Masks (D, H, W) bool, spacing (D, H, W) in mm. 1 where both masks are empty, 0 where exactly one is.
    Nikolov et al. 2018 (arXiv 1809.04430), equation 4, with surfaces as the surface-distance package has
    them.
    """
    return surface_metrics(reference, prediction, spacing_mm, tolerance_mm)[1]


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the help text its command-line flag shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def build_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """Return the argument parser of a config dataclass: one flag a field, `_` written as `-`.

    bool becomes --flag/--no-flag, Literal becomes choices, tuple takes any number of values, None stands for
    unset.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        kind = hints[field.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):  # X | None
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        settings: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            settings["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            settings |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": field.name.upper()}
        else:
            settings |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(flag, **settings)
    return parser


def parse_config(config_class: type, description: str, arguments: Sequence[str] | None = None) -> Any:
    """Return the config dataclass filled from the command line (or from `arguments`)."""
    values = vars(build_parser(config_class, description).parse_args(arguments))
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def typed_options(arguments: Sequence[str] | None = None) -> set[str]:
    """Return the names of the fields that the command line sets, to whatever value."""
    flags = [text.split("=")[0] for text in (sys.argv[1:] if arguments is None else arguments)]
    return {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags if flag.startswith("--")}


def run_command(main: Callable[[Any], None], config_class: type, description: str) -> None:
    """Parse the command line, call `main(config)` and turn bad input into one sentence and exit code 2.

    Ctrl-C ends with exit code 130, a full disk with 2; any other exception is a defect and keeps its
    traceback.
    """
    config = parse_config(config_class, description)
    name = Path(sys.argv[0]).name
    keep_freed_memory()
    try:
        main(config)
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(
            f"{name}: error: cannot write{place}: {error.strerror}; free space or choose another folder.",
            file=sys.stderr,
        )
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------------
# Seeds, devices, files
# ------------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory of freed tensors; nothing where the C library is another one.

    It gives blocks of 32 MiB and more back to the system at once, and the next layer's map is fetched anew,
    page by page: 440,000 page faults a step and a third of its time for 16 slabs on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_seed(seed: int) -> None:
    """Seed Python, NumPy's global generator (read by libraries alone) and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def choose_device(name: str) -> torch.device:
    """Return the torch device for auto, cuda, cpu or mps; InputError where the one asked for is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[name]:
        raise InputError(
            f"--device {name}: this machine has none that torch can use; take --device auto or cpu."
        )
    return torch.device(name)


def amp_dtype(device: torch.device, amp: bool) -> torch.dtype | None:
    """Return the mixed-precision type for a device, or None for float32.

    CUDA: bfloat16 from compute capability 8, float16 below. CPU: bfloat16 where it has the instructions for
    it.
    """
    if not amp or device.type == "mps":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public test for either
    has_bf16 = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if has_bf16 else None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)` and move the result to `path`; a failure leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{os.getpid()}.{path.name}"
    )  # the suffix stays: writers choose the format by it
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented, with NaN and infinity refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware a number was measured on, as plain values."""
    memory_gb = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    )
    machine = {
        "device": device.type,
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory_gb, 1) if memory_gb else None,
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        machine["cpu"] = names[0] if names else machine["cpu"]
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def command_line() -> str:
    """Return the command that is running, as typed, with the script's name alone."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    packages = (
        "torch",
        "torchvision",
        "albumentations",
        "nibabel",
        "numpy",
        "pandas",
        "opencv-python",
        "scipy",
    )
    found = {name: importlib.metadata.version(name) for name in packages if _is_installed(name)}
    return {"python": platform.python_version(), **found}


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GiB so far: allocated by torch on CUDA, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of a state dict, on whatever device it is."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` holds tensors and plain values, its network under "model"."""
    content = {**content, "format": CHECKPOINT_FORMAT, "weights_sha256": weights_sha256(content["model"])}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, `weights_only=True`; InputError where it is not ours or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one with train_drunet_v2.py or give its path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle, zip and runtime errors alike for a file that is foreign, unsafe or cut short
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); use a best.pt of a run."
        ) from error
    is_ours = isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT
    if not is_ours or not {"model", "weights_sha256"} <= content.keys():
        raise InputError(f"{path}: not a DRUnet V2 checkpoint; use the best.pt or last.pt of a run.")
    if weights_sha256(content["model"]) != content["weights_sha256"]:
        raise InputError(
            f"{path}: the weights do not match their SHA-256; the file is damaged, take another copy."
        )
    return content


def newest_run(results: Path) -> Path:
    """Return the run folder in `results` whose best.pt is newest; raises InputError where there is none."""
    runs = sorted(results.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"{results}: no run with a best.pt; train one first: python train_drunet_v2.py")
    return runs[-1].parent
