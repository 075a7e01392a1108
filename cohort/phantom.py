"""Synthetic brain tumour cohorts in BraTS 2021 layout: the data of the demo and of the tests.

A phantom is a seeded, skull-stripped head (folded cortex, white matter, ventricles, bias field, Rician noise)
with an irregular glioma of one or several foci, and with findings as bright on FLAIR that are not tumour:
periventricular caps, small round white matter lesions, choroid plexus, vessels. These differ from tumour by
shape, place, edge and surroundings, not by the grey value of a voxel. A phantom is no patient: a score on
phantoms says that the code runs and learns, nothing about BraTS.

Reference point: one threshold on FLAIR (z-scored over each brain) for a whole cohort, searched in steps of
0.05 on that same cohort, scores at most a mean per-case WT Dice of 0.50 (SD 0.19, at z > 1.75) on the
internal style and 0.38 (SD 0.22, at z > 1.75) on the external one: n = 100 cases each, cohort seed 0, shape
(40, 120, 120). A network that has learned more than brightness beats that.
"""

import gzip
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit

from cohort.cases import MODALITIES, Case
from cohort.nifti import read_nifti_header
from runtime.errors import InputError
from runtime.files import write_atomically
from runtime.log import log, progress

PHANTOM_NOTE = "synthetic phantoms, not a BraTS result"
PHANTOM_DESCRIPTION = "DRUnet V2 synthetic phantom"  # header text by which a synthetic file is known
FIRST_ID = {"internal": 90000, "external": 95000}  # real BraTS 2021 ids end at 01666
MAX_CASES = 5000  # as many ids as lie between the two styles
TRAINING_PHANTOMS, TRAINING_SEED = 40, 10_000  # of each style, for --phantom-share
TRAINING_PIXELS_MM = (1.0, 1.5, 2.0, 3.0, 4.0)  # of which the nearest to the pixels of the cases is taken
TRAINING_FIELD_MM = 240  # rows and columns that such a phantom spans
TRAINING_VERSION = 1  # raise when phantoms change: those of another version are not trained on
FIELD_OF_VIEW_MM = (155.0, 200.0, 165.0)  # D, H, W: what the largest brain needs
MAX_SPACING_MM = 20.0  # beyond it, a small tumour could fall between two slices
HALF_AXES_MM = (66.5, 87.0, 70.0)  # D, H, W of the mean brain

# Relative brightness of each tissue, one column a tissue, one row a modality in the order of MODALITIES.
TISSUES = ("csf", "grey", "white", "lesion", "vessel", "edema", "core", "rim")
INTERNAL_BRIGHTNESS = (
    (0.14, 0.68, 0.50, 1.00, 1.00, 1.00, 0.62, 0.86),
    (0.20, 0.54, 0.82, 0.60, 0.66, 0.54, 0.38, 0.56),
    (0.18, 0.54, 0.74, 0.56, 1.35, 0.50, 0.32, 1.30),
    (1.20, 0.62, 0.42, 0.82, 0.50, 0.82, 0.95, 0.68),
)
EXTERNAL_BRIGHTNESS = (
    (0.22, 0.68, 0.55, 0.94, 1.00, 0.94, 0.68, 0.84),
    (0.28, 0.54, 0.74, 0.56, 0.60, 0.52, 0.42, 0.56),
    (0.28, 0.56, 0.68, 0.55, 1.15, 0.52, 0.42, 1.05),
    (1.05, 0.64, 0.50, 0.84, 0.55, 0.84, 0.92, 0.72),
)


def is_phantom(case: Case) -> bool:
    """Tell whether a case was made by make_phantom_v2.py, by the description in its NIfTI header.

    What cannot be told, as the file is gone or damaged, counts as a patient.
    """
    if case.layout == "slices" or not case.modalities:
        return False
    try:
        header = read_nifti_header(next(iter(case.modalities.values()))[0]).header
    except InputError:
        return False
    return bytes(header["descrip"]).rstrip(b"\0") == PHANTOM_DESCRIPTION.encode()


def name_kind(are_phantoms: Iterable[bool]) -> str:
    """Return "phantom" or "real", of cases each of which is one or the other, or "mixed"."""
    return join_kinds("phantom" if each else "real" for each in are_phantoms)


def join_kinds(kinds: Iterable[str]) -> str:
    """Return the kind of what is of these kinds together: theirs where they are one, else "mixed"."""
    different = set(kinds)
    return different.pop() if len(different) == 1 else "mixed"


class Scanner(NamedTuple):
    """What tells one cohort style from the other: the look of the tissues and the flaws of the images."""

    brightness: tuple[tuple[float, ...], ...]  # (modality, tissue)
    noise: float  # SD of the Rician noise, on the scale of the brightness
    bias: float  # SD of the log of the bias field
    blur_mm: float  # SD of the Gaussian point spread


SCANNERS = {
    "internal": Scanner(INTERNAL_BRIGHTNESS, noise=0.030, bias=0.08, blur_mm=0.5),
    "external": Scanner(EXTERNAL_BRIGHTNESS, noise=0.045, bias=0.13, blur_mm=0.9),
}


class Phantom(NamedTuple):
    """One synthetic case."""

    modalities: dict[str, np.ndarray]  # flair, t1, t1ce, t2: (D, H, W) int16, exactly 0 outside the brain
    labels: np.ndarray  # (D, H, W) uint8: 0 none, 1 necrotic or non-enhancing core, 2 edema, 4 enhancing
    spacing_mm: tuple[float, float, float]  # D, H, W


class Focus(NamedTuple):
    """One centre of tumour growth, in mm from the middle of the head (D, H, W order)."""

    centre_mm: np.ndarray  # (3,)
    stretch: np.ndarray  # (3, 3): turns an offset into one whose length is the distance inside an ellipsoid
    core_mm: float  # radius of core and rim
    edema_mm: float  # radius of the whole tumour
    rim_mm: float  # thickness of the enhancing rim; 0: no enhancement


class Brain(NamedTuple):
    """Healthy anatomy on the V voxels inside the brain; distances in mm, rough away from a surface."""

    mask: np.ndarray  # (D, H, W) bool, V voxels set
    points_mm: np.ndarray  # (3, V) z, y, x: up, back and the patient's left are positive
    healthy_mm: (
        np.ndarray
    )  # (3, V) where that tissue lay before the tumour pushed it, with both sides folded onto the left
    depth_mm: np.ndarray  # (V,) below the surface of the brain
    ventricle_mm: np.ndarray  # (V,) distance to the lateral ventricles, negative inside
    csf: np.ndarray  # (V,) fractions: csf + grey + white = 1
    grey: np.ndarray
    white: np.ndarray


class Tumour(NamedTuple):
    """A tumour on the V voxels inside the brain."""

    labels: np.ndarray  # (V,) uint8
    edema: np.ndarray  # (V,) float32 fractions in [0, 1], to be painted in this order
    core: np.ndarray
    rim: np.ndarray


class Fields:
    """Smooth random fields over the head, the same for a seed at every shape and spacing."""

    def __init__(self, rng: np.random.Generator, axes_mm: Sequence[np.ndarray]) -> None:
        """Take the source of randomness and the voxel coordinates along D, H and W, in mm."""
        self.rng = rng
        self.axes_mm = axes_mm

    def draw(self, scale_mm: float) -> np.ndarray:
        """Draw a (D, H, W) float32 field of mean 0 and SD about 1 that changes over `scale_mm`.

        White noise on a lattice fixed in mm, interpolated by cubic B-splines: neither the lattice nor the
        number of random draws depends on the voxels, and the interpolation is one matrix product an axis.
        """
        half_mm = 100.0  # beyond the brain in every direction
        knots = int(np.ceil(2 * half_mm / scale_mm)) + 4
        field = self.rng.standard_normal((knots, knots, knots), dtype=np.float32)
        for axis_mm in self.axes_mm:
            position = np.clip((axis_mm + half_mm) / scale_mm + 1, 1, knots - 3)
            distance = np.abs(position[:, None] - np.arange(knots))
            near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
            weights = np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)
            field = np.tensordot(field, weights, axes=(0, 1))  # takes the first axis, puts the new one last
        return field * (315 / 151) ** 1.5  # 151/315: the mean squared weight of a cubic B-spline, per axis


def plan_foci(rng: np.random.Generator) -> list[Focus]:
    """Draw where the tumour grows: one to three foci, large or small, enhancing or not, in one hemisphere."""
    count = rng.choice([1, 2, 3], p=[0.65, 0.25, 0.10])
    enhancing = rng.random() < 0.8
    side = rng.choice([-1.0, 1.0])
    size = rng.uniform(0.55, 1.25)
    centre = np.array([rng.uniform(-18, 36), rng.uniform(-48, 50), side * rng.uniform(20, 40)])
    foci = []
    for _ in range(count):
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        stretch = turn * np.exp(rng.normal(0, 0.16, 3))
        core = size * rng.uniform(9, 18)
        edema = core + (rng.uniform(6, 15) if enhancing else rng.uniform(2, 7))
        foci.append(Focus(centre, stretch, core, edema, rng.uniform(2.5, 5.5) if enhancing else 0.0))
        offset = rng.standard_normal(3)
        centre = foci[0].centre_mm + offset / np.linalg.norm(offset) * rng.uniform(20, 38)
        centre = np.clip(centre, [-30, -58, side * 30 - 20], [42, 58, side * 30 + 20])
        size *= rng.uniform(0.4, 0.8)
    return foci


def build_brain(fields: Fields, foci: Sequence[Focus]) -> Brain:
    """Build the healthy brain, pushed aside by the tumour, on the voxels inside it."""
    rng = fields.rng
    z, y, x = np.meshgrid(*fields.axes_mm, indexing="ij", sparse=True)
    size = np.float32(HALF_AXES_MM * rng.uniform(0.96, 1.02, 3))
    z_warped, y_warped, x_warped = (axis + 1.7 * fields.draw(40.0) for axis in (z, y, x))
    width = size[2] * (1 - 0.16 * np.clip(-y / size[1], 0, 1) ** 2)  # the frontal lobes are narrower
    scaled = (z_warped / size[0], y_warped / size[1], x_warped / width)
    outer_mm = 72 * (1 - sum(np.abs(axis) ** 2.2 for axis in scaled) ** (1 / 2.2))  # depth below the surface
    mask = outer_mm > 0
    depth = outer_mm[mask]
    points = np.stack([np.broadcast_to(axis, mask.shape)[mask] for axis in (z, y, x)])
    healthy = np.stack([z_warped[mask], y_warped[mask], x_warped[mask]])
    crowding = np.zeros_like(depth)
    for focus in foci:  # mass effect: tissue seen at a point comes from nearer the focus
        offset = points - np.float32(focus.centre_mm)[:, None]
        weight = np.exp(-(offset**2).sum(0) / (2 * (focus.edema_mm + 4) ** 2))
        healthy -= 0.3 * min(1.0, focus.core_mm / 14) * weight * offset
        crowding = np.maximum(crowding, weight)

    healthy[2] = np.abs(healthy[2])
    ventricle = ventricle_distance(healthy, rng.uniform(0.8, 1.3))
    third = ellipsoid_distance(healthy, (-8, 4, 0), (11, 13, 2.5))
    nuclei = ellipsoid_distance(healthy, (-2, 4, 22), (13, 22, 8))
    # Sulci are the zero level of a field, so they branch like folds; they fade out below the cortical ribbon.
    fold = np.abs(fields.draw(8.5)[mask]) * 6.0 + np.maximum(0, depth - 17) * 0.7
    midline = healthy[2] + np.maximum(0, depth - 34) * 0.6
    sulcus = np.minimum(np.minimum(depth + 0.3, fold), midline) + 1.2 * crowding  # mm to the nearest cleft
    opening = rng.uniform(0.6, 1.5)
    csf = np.maximum(expit((opening - sulcus) / 0.45), expit(-np.minimum(ventricle, third) / 0.6))
    ribbon = expit((opening + 3.0 - sulcus) / 0.6)
    grey = np.maximum(ribbon, 0.75 * expit(-nuclei)) * (1 - csf)
    return Brain(mask, points, healthy, depth, ventricle, csf, grey, 1 - csf - grey)


def ellipsoid_distance(
    points_mm: np.ndarray, centre: Sequence[float], half_axes: Sequence[float]
) -> np.ndarray:
    """Return the rough distance in mm of (3, V) points to an upright ellipsoid, (V,), negative inside."""
    scaled = (points_mm - np.float32(centre)[:, None]) / np.float32(half_axes)[:, None]
    return (np.sqrt((scaled**2).sum(0)) - 1) * np.float32(min(half_axes))


def ventricle_distance(healthy_mm: np.ndarray, size: float) -> np.ndarray:
    """Return the rough distance in mm to the two lateral ventricles, (V,); their horns bend out and down."""
    z, y, x = healthy_mm
    straightened = np.stack([z + 0.006 * y**2, y, x - 0.010 * y**2])
    return ellipsoid_distance(straightened, (11, 2, 10), (10 * size, 38, 7 * size))


def focus_distance(points_mm: np.ndarray, focus: Focus) -> np.ndarray:
    """Return the distance in mm of (3, V) points to the centre of a focus, (V,), in its stretched space."""
    offset = points_mm - np.float32(focus.centre_mm)[:, None]
    return np.sqrt(((np.float32(focus.stretch).T @ offset) ** 2).sum(0))


def build_tumour(fields: Fields, brain: Brain, foci: Sequence[Focus]) -> Tumour:
    """Grow the tumour in a brain; the labels are its underlying distance fields cut at zero.

    Edema spreads along white matter and spares the cortex, with a soft border that differs per case. The core
    holds necrosis inside a rim of uneven thickness, is solid, or does not enhance. No ventricle is invaded.
    """
    rough_edema = (5.0 * fields.draw(13.0) + 2.0 * fields.draw(6.0))[brain.mask]
    rough_core = (2.6 * fields.draw(9.0) + 1.3 * fields.draw(4.5))[brain.mask]
    rim_mm = np.zeros_like(brain.csf)
    edema_mm = np.full_like(brain.csf, -np.inf)
    core_mm = edema_mm.copy()
    for focus in foci:
        distance = focus_distance(brain.points_mm, focus)
        rough = min(1.0, focus.core_mm / 12)  # a small focus is as round as its size allows
        edema_mm = np.maximum(edema_mm, focus.edema_mm - distance + rough * rough_edema)
        here_mm = focus.core_mm - distance + rough * rough_core
        rim_mm = np.where(here_mm > core_mm, focus.rim_mm, rim_mm)
        core_mm = np.maximum(core_mm, here_mm)
    core_mm = np.minimum(core_mm, brain.ventricle_mm)
    edema_mm = np.maximum(edema_mm - 5 * brain.grey, core_mm)
    edema_mm = np.minimum(edema_mm, brain.ventricle_mm)
    rim_mm = rim_mm * (1 + 0.55 * fields.draw(11.0)[brain.mask])

    edema = expit(edema_mm / fields.rng.uniform(0.8, 2.6)) * (1 - brain.csf)
    core = expit(core_mm / 0.8)
    rim = core * expit((rim_mm - core_mm) / 0.6) * (rim_mm > 0)
    labels = np.select([(core > 0.5) & (core_mm < rim_mm), core > 0.5, edema > 0.5], [4, 1, 2], 0)
    return Tumour(labels.astype(np.uint8), edema, core, rim)


def build_lookalikes(fields: Fields, brain: Brain, foci: Sequence[Focus]) -> tuple[np.ndarray, np.ndarray]:
    """Return the fractions (V,), (V,) of lesions and of vessels: as bright as tumour, but not tumour.

    Lesions keep clear of the tumour, so that no label depends on where one would end and the other begin.
    """
    rng = fields.rng
    z, y, x = brain.points_mm
    clearance = np.min([focus_distance(brain.points_mm, focus) - focus.edema_mm for focus in foci], axis=0)
    horns = np.clip(np.abs(brain.healthy_mm[1]) / 26 - 0.35, 0, 1)
    cap_mm = rng.uniform(0.5, 5.5) * horns + 1.0 * fields.draw(8.0)[brain.mask]
    lesion = expit((cap_mm - brain.ventricle_mm) / 0.9) * expit((clearance - 5) / 1.5)
    for _ in range(rng.poisson(rng.uniform(3, 30))):
        radius = 1.6 + rng.gamma(1.6, 1.2)
        centre = (rng.uniform(-15, 42), rng.uniform(-55, 58), rng.choice([-1, 1]) * rng.uniform(16, 48))
        place = np.float32(centre)[:, None]  # (3, 1)
        if min(focus_distance(place, focus)[0] - focus.edema_mm for focus in foci) > radius + 6:
            distance = ellipsoid_distance(brain.points_mm, centre, radius * rng.uniform(0.8, 1.25, 3))
            lesion = np.maximum(lesion, expit(-distance / 0.5))
    lesion *= brain.white * rng.uniform(0.65, 1.0)

    choroid = ellipsoid_distance(brain.healthy_mm, (3, 27, 16), (4, 8, 3.5))
    sinus = np.max([np.abs(x) - 2.2, brain.depth_mm - 4, -z, -y], axis=0)
    bend = rng.uniform(0, 2 * np.pi)
    tube_x = x - float(rng.choice([-1, 1])) * (44 + 3 * np.sin(y / 6 + bend))
    tube = np.maximum(np.hypot(tube_x, z + 6 + 4 * np.cos(y / 8 + bend)) - 1.8, np.abs(y + 4) - 22)
    vessel = expit(-np.min([choroid, sinus, tube], axis=0) / 0.5) * rng.uniform(0.6, 1.0)
    return lesion, vessel


def scan(
    fields: Fields, brain: Brain, layers: Sequence[np.ndarray], scanner: Scanner, spacing_mm: Sequence[float]
) -> np.ndarray:
    """Image the tissues: (modality, V) float32, in arbitrary units that differ per modality.

    `layers` are the fractions (V,) of TISSUES from the fourth on, each painted over what is there. Bias is a
    smooth gain, blur acts before the noise, and the noise is Rician: the magnitude of a signal with Gaussian
    noise of equal SD in its real and imaginary part.
    """
    rng = fields.rng
    weights = [brain.csf, brain.grey, brain.white]
    for layer in layers:
        weights = [weight * (1 - layer) for weight in weights] + [layer]
    spread = np.where(np.array(TISSUES) == "core", 0.15, 0.04)
    brightness = np.array(scanner.brightness)
    brightness *= 1 + spread * rng.standard_normal(brightness.shape)
    signal = brightness.astype(np.float32) @ np.stack(weights)
    tumour = np.maximum(layers[-3], layers[-2])
    signal *= 1 + 0.03 * fields.draw(6.0)[brain.mask] + 0.12 * tumour * fields.draw(7.0)[brain.mask]
    signal *= np.exp(scanner.bias * np.stack([fields.draw(70.0)[brain.mask] for _ in MODALITIES]))
    gain = rng.uniform(500, 2000, (len(MODALITIES), 1)).astype(np.float32)
    noise = scanner.noise * rng.uniform(0.7, 1.3)

    grid = np.zeros(brain.mask.shape, np.float32)
    sigma = scanner.blur_mm / np.array(spacing_mm)
    for row in signal:
        grid[brain.mask] = row
        row[:] = gaussian_filter(grid, sigma, truncate=3.0)[brain.mask]
    # Last of all draws, as their number depends on the voxels.
    real, imaginary = np.float32(noise) * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return gain * np.hypot(signal + real, imaginary)


def make_phantom(
    seed: int,
    shape: tuple[int, ...] = (40, 120, 120),
    spacing_mm: tuple[float, ...] = (4.0, 2.0, 2.0),
    style: Literal["internal", "external"] = "internal",
) -> Phantom:
    """Make one phantom of `shape` (D, H, W): the same arguments give the same voxels.

    D increases towards the top of the head, H towards its back, W towards the patient's left. One seed is one
    head with one tumour, of one size in mm, at every shape and spacing; in the other style it is that head in
    another scanner. Raises InputError (a ValueError) where shape times spacing does not hold a brain.
    """
    check_request(seed, shape, spacing_mm, style)
    # Only the part of the grid that can hold brain is computed; it is pasted into the whole at the end.
    axes, box = [], []
    for size, step, extent in zip(shape, spacing_mm, FIELD_OF_VIEW_MM, strict=True):
        axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(step)
        near = np.flatnonzero(np.abs(axis) <= extent / 2)
        axes.append(axis[near])
        box.append(slice(near[0], near[-1] + 1))
    fields = Fields(np.random.default_rng(seed), axes)
    foci = plan_foci(fields.rng)
    brain = build_brain(fields, foci)
    tumour = build_tumour(fields, brain, foci)
    lesion, vessel = build_lookalikes(fields, brain, foci)
    edema = tumour.edema * fields.rng.uniform(0.42, 1.0)  # how well the tumour stands out differs per case
    layers = (lesion, vessel, edema, tumour.core, tumour.rim)
    images = scan(fields, brain, layers, SCANNERS[style], spacing_mm)

    def paste(values: np.ndarray, dtype: type) -> np.ndarray:
        whole = np.zeros(shape, dtype)
        whole[tuple(box)][brain.mask] = values
        return whole

    images = np.clip(np.rint(images), 1, 32767)  # 0 is kept for the background
    modalities = {name: paste(image, np.int16) for name, image in zip(MODALITIES, images, strict=True)}
    return Phantom(modalities, paste(tumour.labels, np.uint8), tuple(float(step) for step in spacing_mm))


def check_request(seed: int, shape: Sequence[int], spacing_mm: Sequence[float], style: str) -> None:
    """Raise InputError unless a phantom can be made: `shape` at `spacing_mm` must hold the largest brain."""
    if seed < 0:
        raise InputError(f"--seed {seed}", "must be 0 or more")
    if style not in SCANNERS:
        raise InputError(f"--style {style}", f"must be one of {', '.join(SCANNERS)}")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"--shape {tuple(shape)}", "must be three positive numbers of voxels (D H W)")
    if len(spacing_mm) != 3 or not all(0 < step <= MAX_SPACING_MM for step in spacing_mm):
        raise InputError(
            f"--spacing-mm {tuple(spacing_mm)}",
            f"must be three numbers above 0, up to {MAX_SPACING_MM} (D H W)",
        )
    extent_mm = tuple(size * step for size, step in zip(shape, spacing_mm, strict=True))
    if any(have < need for have, need in zip(extent_mm, FIELD_OF_VIEW_MM, strict=True)):
        raise InputError(
            f"--shape {tuple(shape)} at --spacing-mm {tuple(spacing_mm)}",
            f"spans {extent_mm} mm (D H W), but a brain needs {FIELD_OF_VIEW_MM} mm",
            "raise one of them",
        )


def write_volume(path: Path, volume: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Write a (D, H, W) volume as .nii.gz in the LPS frame of BraTS; equal volumes give equal bytes."""
    step_z, step_y, step_x = spacing_mm
    affine = np.diag([-step_x, -step_y, step_z, 1.0])
    affine[1, 3] = (volume.shape[1] - 1) * step_y
    image = nib.Nifti1Image(volume.transpose(2, 1, 0), affine)
    image.header["descrip"] = PHANTOM_DESCRIPTION
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    content = gzip.compress(image.to_bytes(), compresslevel=3, mtime=0)
    write_atomically(path, lambda part: part.write_bytes(content))


def check_phantom_folder(directory: Path, num_cases: int, style: Literal["internal", "external"]) -> None:
    """Raise InputError where `write_cohort` would replace a file that is no phantom."""
    first = FIRST_ID[style]
    for number in range(first, first + num_cases):
        for path in sorted((directory / f"BraTS2021_{number:05d}").glob("*.nii.gz")):
            try:
                is_phantom = nib.load(path).header["descrip"].item().decode() == PHANTOM_DESCRIPTION
            except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error):
                is_phantom = False
            if not is_phantom:
                raise InputError(
                    path, "is there and is no phantom", "choose another --output, or pass --overwrite"
                )


def write_cohort(
    directory: Path,
    num_cases: int,
    seed: int = 0,
    shape: tuple[int, ...] = (40, 120, 120),
    spacing_mm: tuple[float, ...] = (4.0, 2.0, 2.0),
    style: Literal["internal", "external"] = "internal",
) -> list[Path]:
    """Write `num_cases` phantoms below `directory` and return their folders, in order of id.

    The folders and files are named as in BraTS 2021. A case is `make_phantom(100_000 * seed + id)`: cohorts
    of different seeds or styles share no head, and a longer cohort begins with the cases of a shorter one.
    Files that exist are replaced, each atomically; folders of other ids are left alone.
    """
    if not 1 <= num_cases <= MAX_CASES:
        raise InputError(f"--cases {num_cases}", f"must lie between 1 and {MAX_CASES}")
    check_request(seed, shape, spacing_mm, style)
    folders = []
    first = FIRST_ID[style]
    for number in progress(range(first, first + num_cases), f"{style} phantoms", "phantom"):
        phantom = make_phantom(100_000 * seed + number, shape, spacing_mm, style)
        folder = directory / f"BraTS2021_{number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, volume in (*phantom.modalities.items(), ("seg", phantom.labels)):
            write_volume(folder / f"{folder.name}_{name}.nii.gz", volume, phantom.spacing_mm)
        folders.append(folder)
    return folders


def training_phantoms(directory: Path, pixel_mm: float) -> tuple[Path, dict[str, Any], list[str]]:
    """Return folder, shape and ids of the phantoms to train on beside cases whose pixels are so large."""
    step = min(TRAINING_PIXELS_MM, key=lambda each: abs(each - pixel_mm))
    side = round(TRAINING_FIELD_MM / step)
    ids = [f"BraTS2021_{FIRST_ID[style] + index}" for style in SCANNERS for index in range(TRAINING_PHANTOMS)]
    shape = {"shape": (40, side, side), "spacing_mm": (4.0, step, step)}
    return directory / f"v{TRAINING_VERSION}_{step:g}_mm", shape, ids


def write_training_phantoms(directory: Path, pixel_mm: float) -> None:
    """Write the phantoms of `training_phantoms` that are not there yet.

    They are the heads of seed 10,000 of make_phantom_v2.py: none of the demo, or of any other seed.
    """
    folder, shape, ids = training_phantoms(directory, pixel_mm)
    if not all((folder / name / f"{name}_seg.nii.gz").exists() for name in ids):  # the last that is written
        for style in SCANNERS:
            write_cohort(folder, TRAINING_PHANTOMS, TRAINING_SEED, style=style, **shape)


# ------------------------------------------------------------------------------------------------------------
# The demo
# ------------------------------------------------------------------------------------------------------------

DEFAULT_DATA = Path("data/BraTS2021")
DEMO_DATA = Path("data/phantom_internal")


def choose_data_dir(data_dir: str | tuple[str, ...] | None) -> str | tuple[str, ...]:
    """Return what was asked for, else data/BraTS2021, else the demo's phantoms, made where missing."""
    if data_dir is not None:
        return data_dir
    if DEFAULT_DATA.is_dir():
        return str(DEFAULT_DATA)
    log.info(f"No --data-dir and no {DEFAULT_DATA}: the demo, on {PHANTOM_NOTE}.")
    demo = (("internal", DEMO_DATA, 40), ("external", DEMO_DATA.with_name("phantom_external"), 10))
    for style, folder, cases in demo:
        if len(list(folder.glob("*/*_seg.nii.gz"))) != cases:
            write_cohort(folder, cases, style=style)
    return str(DEMO_DATA)
