"""From volumes to balanced, augmented slabs: normalisation, cache, split, balance, loaders.

Training, validation, audit and prediction all reach pixels through `normalise_volume`, `gather_slab` and
`fit_slices`, so the network never meets a pixel at test time that was made another way at training time.

Run as a command it prints the slice balance of a data set before and after weighting and draws it:

    python dataset_balance_v2.py --data-dir data/BraTS2021
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # it asks a server for its newest version at import otherwise

import albumentations as A  # noqa: E402, N812
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset, Sampler  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cases_v2 import Case, LoadedCase, find_cases, load_case, regions_from_labels, with_reference  # noqa: E402
from utils_v2 import InputError, option, run_command, write_atomically, write_json  # noqa: E402

Z_RANGE = (-3.0, 6.0)  # normalised intensities are clipped to it; augmentation maps it to 0..1
RESIZE_ABOVE = 1.25  # slices up to a quarter larger than the network's input are cropped, larger ones resized
BRAIN_SLICE_VOXELS = 64  # a slice with fewer brain voxels counts as empty
CACHE_VERSION = 1  # raise when normalisation changes: old cache entries are then never read


# ---------------------------------------------------------------------------------------------------------------
# Normalisation and geometry
# ---------------------------------------------------------------------------------------------------------------


def brain_mask(intensities: np.ndarray) -> np.ndarray:
    """Return the bool foreground (D, H, W) of one modality: skull-stripped brain, or the head where it is not.

    Background is the commonest value on the slices' borders. Foreground is what lies above it by a tenth of the way
    to the 99.5th percentile of the brighter voxels, which leaves out the noise of air. All False for a constant
    volume.
    """
    border = np.concatenate([intensities[:, (0, -1), :].ravel(), intensities[:, :, (0, -1)].ravel()])
    values, counts = np.unique(border, return_counts=True)
    background = values[counts.argmax()]
    brighter = intensities[intensities > background]
    if brighter.size == 0:
        return np.zeros(intensities.shape, bool)
    return intensities > background + 0.1 * (np.percentile(brighter, 99.5) - background)


def normalise_volume(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (z-scores (C, D, H, W) float32 in Z_RANGE, brain voxels (D,) of the first modality).

    Mean and SD are those of each modality's own foreground, clipped to its 0.5th to 99.5th percentile, so a few
    outlier voxels move nothing. Values are rounded to float16, the precision of the cache, so that pixels are the
    same with and without it. A constant modality becomes 0.
    """
    scores = np.zeros_like(volume, dtype=np.float32)
    brain_voxels = np.zeros(volume.shape[1], np.int64)
    for channel, intensities in enumerate(volume):
        mask = brain_mask(intensities)
        if channel == 0:
            brain_voxels = mask.sum((1, 2))
        inside = intensities[mask]
        if inside.size == 0:
            continue
        inside = np.clip(inside, *np.percentile(inside, [0.5, 99.5]))
        deviation = float(inside.std()) or 1.0
        z = np.clip((intensities - float(inside.mean())) / deviation, *Z_RANGE)
        scores[channel] = z.astype(np.float16)
    return scores, brain_voxels


@dataclass(frozen=True)
class Placement:
    """How native slices lie in the network's input: resized to `inner`, then padded or centre-cropped to `size`."""

    native: tuple[int, int]  # (H, W) on the native grid
    inner: tuple[int, int]  # (H, W) after resizing; equal to native where nothing was resized
    size: int  # side of the network's input


def place_slices(height: int, width: int, size: int) -> Placement:
    """Return the placement of (height, width) slices in a size x size input."""
    longest = max(height, width)
    if longest <= RESIZE_ABOVE * size:
        return Placement((height, width), (height, width), size)
    scale = size / longest
    return Placement((height, width), (max(1, round(height * scale)), max(1, round(width * scale))), size)


def _pad_or_crop(array: np.ndarray, height: int, width: int, mode: Literal["edge", "constant"]) -> np.ndarray:
    """Centre the last two axes of an array in (height, width); padding with this target is undone by cropping."""
    for axis, target in ((-2, height), (-1, width)):
        excess = array.shape[axis] - target
        if excess > 0:
            array = np.take(array, range(excess // 2, excess // 2 + target), axis)
        elif excess < 0:
            before = -excess // 2
            padding = [(0, 0)] * array.ndim
            padding[axis] = (before, -excess - before)
            array = np.pad(array, padding, mode=mode)
    return array


def fit_slices(slices: np.ndarray, placement: Placement, is_mask: bool = False) -> np.ndarray:
    """Bring slices (..., H, W) from the native grid to (..., size, size).

    Intensities are padded with their edge values and resized by area; masks are padded with 0 and resized by nearest
    neighbour. With padding alone, `unfit_slices` gives the input back exactly.
    """
    if placement.inner != placement.native:
        interpolation = cv2.INTER_NEAREST if is_mask else cv2.INTER_AREA
        slices = _resize(slices, placement.inner, interpolation)
    return _pad_or_crop(slices, placement.size, placement.size, "constant" if is_mask else "edge")


def unfit_slices(slices: np.ndarray, placement: Placement) -> np.ndarray:
    """Bring probabilities (..., size, size) back to the native grid (..., H, W); 0 where the crop cut voxels off."""
    slices = _pad_or_crop(slices, *placement.inner, "constant")
    if placement.inner != placement.native:
        slices = _resize(slices, placement.native, cv2.INTER_LINEAR)
    return slices


def _resize(slices: np.ndarray, shape: tuple[int, int], interpolation: int) -> np.ndarray:
    flat = slices.reshape(-1, *slices.shape[-2:])
    kind = np.uint8 if flat.dtype == np.bool_ else np.float32
    resized = np.stack([cv2.resize(s.astype(kind), shape[::-1], interpolation=interpolation) for s in flat])
    return resized.astype(slices.dtype).reshape(*slices.shape[:-2], *shape)


def gather_slab(volume: np.ndarray, z: int, context: int) -> np.ndarray:
    """Return slices z - context .. z + context of a volume (C, D, H, W) as one slab (C*K, H, W).

    Channel order: all slices of the first modality, then of the next. Slices beyond the ends repeat the end slice.
    """
    depth = volume.shape[1]
    if not 0 <= z < depth:
        raise ValueError(f"slice {z} is outside 0..{depth - 1}")
    indices = np.clip(np.arange(z - context, z + context + 1), 0, depth - 1)
    return volume[:, indices].reshape(-1, *volume.shape[2:])


# ---------------------------------------------------------------------------------------------------------------
# Prepared cases: decoded and normalised once, memory-mapped from then on
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCase:
    """A case in the cache, on its native grid. It holds paths, not arrays, so that loader workers copy nothing."""

    case_id: str
    patient_id: str
    cohort: str
    folder: Path
    spacing_mm: tuple[float, float, float]
    image_sha256: str  # of the normalised first modality: the same for a copy under another name
    brain_voxels: tuple[int, ...]  # per slice
    region_voxels: tuple[tuple[int, ...], ...]  # per region, per slice

    @property
    def volume(self) -> np.ndarray:
        """Normalised volume (C, D, H, W) float16, memory-mapped."""
        return np.load(self.folder / "volume.npy", mmap_mode="r")

    @property
    def reference(self) -> np.ndarray:
        """Region masks (R, D, H, W) bool, memory-mapped."""
        return np.load(self.folder / "reference.npy", mmap_mode="r")


def _cache_key(case: Case, modalities: Sequence[str], regions: Sequence[str]) -> str:
    files = [path for name in modalities for path in case.modalities[name]] + list(case.mask)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([CACHE_VERSION, list(modalities), list(regions), case.slice_channel, stats])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def prepare_case(
    case: Case, modalities: Sequence[str], regions: Sequence[str], cache_dir: Path
) -> PreparedCase:
    """Decode and normalise one case with a mask into the cache, or find it there."""
    folder = cache_dir / f"{case.case_id}-{_cache_key(case, modalities, regions)}"
    if not folder.is_dir():
        loaded = load_case(case, modalities)
        assert loaded.labels is not None
        volume, brain_voxels = normalise_volume(loaded.volume)
        reference = regions_from_labels(loaded.labels, case.convention, regions)
        facts = {
            "spacing_mm": loaded.spacing_mm,
            "image_sha256": hashlib.sha256(volume[0].tobytes()).hexdigest(),
            "brain_voxels": brain_voxels.tolist(),
            "region_voxels": reference.sum((2, 3)).tolist(),
        }
        _write_cache_entry(folder, volume.astype(np.float16), reference, facts)
    facts = json.loads((folder / "facts.json").read_text())
    return PreparedCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        cohort=case.cohort,
        folder=folder,
        spacing_mm=tuple(facts["spacing_mm"]),
        image_sha256=facts["image_sha256"],
        brain_voxels=tuple(facts["brain_voxels"]),
        region_voxels=tuple(tuple(counts) for counts in facts["region_voxels"]),
    )


def _write_cache_entry(
    folder: Path, volume: np.ndarray, reference: np.ndarray, facts: dict[str, Any]
) -> None:
    """Write an entry under a temporary name and move it into place whole; of two writers the first one stays."""
    temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        np.save(temporary / "volume.npy", volume)
        np.save(temporary / "reference.npy", reference)
        write_json(temporary / "facts.json", facts)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_cases(
    cases: Sequence[Case], modalities: Sequence[str], regions: Sequence[str], cache_dir: str | Path
) -> list[PreparedCase]:
    """Prepare every case, with a progress bar."""
    progress = tqdm(cases, desc="preparing cases", unit="case", leave=False)
    return [prepare_case(case, modalities, regions, Path(cache_dir)) for case in progress]


# ---------------------------------------------------------------------------------------------------------------
# Split
# ---------------------------------------------------------------------------------------------------------------

SPLIT_PARTS = ("train", "validation", "test")


def split_cases(
    cases: Sequence[Case], seed: int = 0, fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)
) -> dict[str, Any]:
    """Return a split by patient: seed, fractions, case ids of train, validation and test, and a SHA-256 of them.

    Patients are sorted, then shuffled by the seed, so the split depends on the ids alone. Each part gets at least one
    patient; fewer than three patients raise InputError.
    """
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 3:
        raise InputError(
            f"{len(patients)} patient(s) cannot be split into train, validation and test; 3 are needed."
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    counts = [max(1, round(fraction * len(patients))) for fraction in fractions[1:]]
    edges = [0, counts[0], sum(counts), len(patients)]
    part_of = {}
    for part, start, stop in zip(("validation", "test", "train"), edges, edges[1:], strict=False):
        part_of |= {patients[index]: part for index in order[start:stop]}
    parts = {
        part: sorted(case.case_id for case in cases if part_of[case.patient_id] == part)
        for part in SPLIT_PARTS
    }
    return {"seed": seed, "fractions": list(fractions), **parts, "sha256": split_sha256(parts)}


def split_sha256(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the case ids in train, validation and test."""
    return hashlib.sha256(json.dumps([parts[part] for part in SPLIT_PARTS]).encode()).hexdigest()


def read_split(path: str | Path) -> dict[str, Any]:
    """Read a split file; raises InputError where it is missing, altered, or its parts share a case."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such split file; give the split.json of a run.")
    try:
        split = json.loads(path.read_text())
        intact = split["sha256"] == split_sha256(split)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a split file ({error}); give the split.json of a run.") from error
    if not intact:
        raise InputError(
            f"{path}: the case ids do not match their SHA-256; the split was altered, take the original."
        )
    ids = [case_id for part in SPLIT_PARTS for case_id in split[part]]
    if len(ids) != len(set(ids)):
        raise InputError(f"{path}: a case is in more than one part of the split.")
    return split


def cases_of_split(
    cases: Sequence[Case], split: Mapping[str, Any], part: str, data_dir: str | Path
) -> list[Case]:
    """Return the cases of one part in the split's order; raises InputError where one is not among `cases`."""
    by_id = {case.case_id: case for case in cases}
    if missing := [case_id for case_id in split[part] if case_id not in by_id]:
        raise InputError(
            f"{data_dir}: {len(missing)} {part} case(s) of the split are not there, first {missing[0]}."
        )
    return [by_id[case_id] for case_id in split[part]]


# ---------------------------------------------------------------------------------------------------------------
# Balance
# ---------------------------------------------------------------------------------------------------------------


def slice_table(cases: Sequence[PreparedCase], regions: Sequence[str]) -> pd.DataFrame:
    """Return one row a slice: case (index into `cases`), z, brain_voxels, and the voxels of each region."""
    frames = []
    for index, case in enumerate(cases):
        columns = {"case": index, "z": np.arange(len(case.brain_voxels)), "brain_voxels": case.brain_voxels}
        columns |= dict(zip(regions, case.region_voxels, strict=True))
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def slice_kind(table: pd.DataFrame) -> np.ndarray:
    """Return the kind of each row of a slice table: "tumour", "brain" (brain without tumour) or "empty"."""
    regions = table.columns.difference(["case", "z", "brain_voxels"])
    has_tumour = (table[regions] > 0).any(axis=1)
    return np.where(
        has_tumour, "tumour", np.where(table["brain_voxels"] >= BRAIN_SLICE_VOXELS, "brain", "empty")
    )


def balance_slices(table: pd.DataFrame, tumour_share: float = 0.5, empty_share: float = 0.02) -> np.ndarray:
    """Return the probability of drawing each slice, shape (rows,), sum 1.

    A draw is a tumour slice with `tumour_share`, an empty one with `empty_share`, and otherwise brain without tumour;
    slices of one kind are equally likely. A kind with no slice leaves its share to the others in proportion.
    """
    kind = slice_kind(table)
    shares = {"tumour": tumour_share, "empty": empty_share, "brain": 1 - tumour_share - empty_share}
    weights = np.zeros(len(table))
    for name, share in shares.items():
        rows = kind == name
        if rows.any():
            weights[rows] = share / rows.sum()
    if weights.sum() == 0:
        raise ValueError(f"no slice can be drawn with tumour_share={tumour_share}, empty_share={empty_share}")
    return weights / weights.sum()


# ---------------------------------------------------------------------------------------------------------------
# Augmentation and loaders
# ---------------------------------------------------------------------------------------------------------------


def build_augmentation() -> A.Compose:
    """Return the training transforms, for float32 slabs (H, W, C*K) in 0..1 and uint8 masks (H, W, R).

    All slices of a slab get the same geometry and the same contrast; only noise differs from slice to slice.
    """
    border = {"border_mode": cv2.BORDER_REPLICATE}
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.Affine(
                scale=(0.85, 1.15),
                rotate=(-20, 20),
                shear=(-5, 5),
                translate_percent=(-0.06, 0.06),
                p=0.6,
                **border,
            ),
            A.ElasticTransform(alpha=60, sigma=9, p=0.15, **border),
            A.RandomBrightnessContrast(brightness_limit=0.08, contrast_limit=0.2, p=0.4),
            A.RandomGamma(gamma_limit=(75, 130), p=0.3),
            A.GaussNoise(std_range=(0.005, 0.03), p=0.2),
        ]
    )


class SlabDataset(Dataset):
    """Training slabs by key (row of the slice table, seed of the draw): (slab (C*K, S, S), target (R, S, S)).

    Both are float32. What comes out depends on the key alone, not on the worker that made it or on what it made
    before, so any number of workers gives the same batches.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        table: pd.DataFrame,
        context: int,
        size: int,
        augment: bool = True,
    ) -> None:
        self.cases = list(cases)
        self.rows = table[["case", "z"]].to_numpy()
        self.context = context
        self.size = size
        self.augmentation = build_augmentation() if augment else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        row, draw_seed = key
        case_index, z = self.rows[row]
        case = self.cases[case_index]
        slab = gather_slab(case.volume, z, self.context).astype(np.float32)
        placement = place_slices(*slab.shape[1:], self.size)
        slab = fit_slices(slab, placement)
        target = fit_slices(case.reference[:, z], placement, is_mask=True).astype(np.uint8)
        if self.augmentation is not None:
            slab, target = self.augment(slab, target, draw_seed)
        return torch.from_numpy(np.ascontiguousarray(slab)), torch.from_numpy(target.astype(np.float32))

    def augment(self, slab: np.ndarray, target: np.ndarray, draw_seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a slab (C*K, S, S) and its target (R, S, S) transformed alike, seeded by the draw."""
        low, high = Z_RANGE
        self.augmentation.set_random_seed(draw_seed)
        pixels = ((slab - low) / (high - low)).transpose(1, 2, 0)
        out = self.augmentation(
            image=np.ascontiguousarray(pixels), mask=np.ascontiguousarray(target.transpose(1, 2, 0))
        )
        slab = out["image"].transpose(2, 0, 1) * (high - low) + low
        return slab.astype(np.float32), out["mask"].transpose(2, 0, 1)


class BalancedSampler(Sampler):
    """Draws rows of the slice table by their weights, with replacement, anew and seeded in each epoch."""

    def __init__(self, weights: np.ndarray, draws: int, seed: int) -> None:
        self.weights = weights
        self.draws = draws
        self.seed = seed
        self.epoch = 0  # set before each pass

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.choice(len(self.weights), self.draws, p=self.weights)
        seeds = generator.integers(0, 2**31, self.draws)
        return iter(zip(rows.tolist(), seeds.tolist(), strict=True))


def start_worker(_: int) -> None:
    """Keep a loader worker to one thread: the workers share the processor with each other."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def make_train_loader(
    dataset: SlabDataset,
    sampler: BalancedSampler,
    batch_size: int,
    workers: int = 0,
    start_method: Literal["fork", "spawn"] | None = None,
) -> DataLoader:
    """Return the training loader; `start_method` None takes the platform's own. The last short batch is dropped."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        multiprocessing_context=start_method if workers else None,
    )


# ---------------------------------------------------------------------------------------------------------------
# Command: show the balance
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalanceConfig:
    """Settings of the balance report."""

    data_dir: str = option("data/BraTS2021", "folder with the cases")
    modalities: tuple[str, ...] = option(("flair",), "modalities to read")
    regions: tuple[str, ...] = option(("WT",), "tumour regions: WT, TC, ET")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR")
    tumour_share: float = option(0.5, "share of draws that show tumour")
    empty_share: float = option(0.02, "share of draws that show no brain")
    cache_dir: str = option("cache", "folder of decoded volumes")
    output: str = option("results/balance.png", "plot to write")


def plot_balance(before: pd.Series, after: pd.Series, path: Path) -> None:
    """Write a bar chart of the share of each slice kind before and after weighting."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    positions = np.arange(len(before))
    for offset, shares, label, colour in (
        (-0.2, before, "as stored", "#9aa5b1"),
        (0.2, after, "as drawn", "#1f6f8b"),
    ):
        bars = axes.bar(positions + offset, shares, 0.38, label=label, color=colour)
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=9)
    axes.set_xticks(positions, [f"{kind} slices" for kind in before.index])
    axes.set_ylabel("share of slices")
    axes.set_ylim(0, min(1.0, max(before.max(), after.max()) * 1.2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))
    plt.close(figure)


def main(config: BalanceConfig) -> None:
    """Print the slice balance of a data set before and after weighting, and draw it."""
    cases = with_reference(
        find_cases(config.data_dir, config.modalities, config.slice_channel), config.data_dir
    )
    prepared = prepare_cases(cases, config.modalities, config.regions, config.cache_dir)
    table = slice_table(prepared, config.regions)
    weights = balance_slices(table, config.tumour_share, config.empty_share)
    kind = pd.Series(slice_kind(table))
    order = ["tumour", "brain", "empty"]
    counts = kind.value_counts().reindex(order, fill_value=0)
    after = pd.Series(weights).groupby(kind).sum().reindex(order, fill_value=0.0)
    patients = len({case.patient_id for case in prepared})
    print(f"{len(prepared)} cases of {patients} patients, {len(table)} slices in {config.data_dir}")
    print(f"{'slices':<8} {'count':>8} {'as stored':>10} {'as drawn':>10}")
    for name in order:
        print(f"{name:<8} {counts[name]:>8} {counts[name] / len(table):>10.1%} {after[name]:>10.1%}")
    plot_balance(counts / len(table), after, Path(config.output))
    print(f"plot: {config.output}")


if __name__ == "__main__":
    run_command(main, BalanceConfig, "Show the slice balance of a data set before and after weighting.")
