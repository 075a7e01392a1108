"""What the leakage check finds and what it finds by mistake: recall and false alarms per disguise.

    python -m benchmarks.leakage                                   phantoms
    python -m benchmarks.leakage --data-dir data/lgg data/brats21  real cohorts, each case another patient

Every case is disguised in each way, given another id, and looked for among all cases as they are. A false
alarm is a pair of different cases that count as one. Times are of the processor, on one thread.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from benchmarks.common import print_table, write_result
from cohort.cases import load_case
from cohort.fingerprints import GRID, fingerprint
from cohort.layouts import CaseSource, find_cases
from cohort.leakage import ALIKE, Identity, compare_thumbnails, find_leakage, identify_case, select_proven
from cohort.phantom import FIRST_ID, make_phantom
from cohort.preprocess import brain_mask, normalise_volume
from runtime.command import run_command

COHORTS = (1251, 335)  # BraTS 2021 and BraTS 2019: what the time is extrapolated to
Disguise = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scan:
    """A case in memory: intensities (D, H, W) and labels (D, H, W) or None."""

    name: str
    intensities: np.ndarray
    labels: np.ndarray | None


# ------------------------------------------------------------------------------------------------------------
# Disguises
# ------------------------------------------------------------------------------------------------------------


def resave(volume: np.ndarray, kind: type) -> np.ndarray:
    """Return a volume written as NIfTI of another type and orientation (RAS), and read back by load_case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x" / "x_flair.nii"
        path.parent.mkdir()
        stored = volume.transpose(2, 1, 0)[::-1, ::-1].astype(kind)
        nib.save(nib.Nifti1Image(stored, np.diag([1.0, 1.0, 1.0, 1.0])), path)
        return load_case(find_cases(CaseSource(folder))[0]).volume[0]


def unit(volume: np.ndarray) -> np.ndarray:
    """Return intensities brought to 0..1."""
    low, high = float(volume.min()), float(volume.max())
    return (volume - low) / (high - low)


def equalise(volume: np.ndarray) -> np.ndarray:
    """Return intensities with a flat histogram."""
    values = np.sort(volume.ravel())
    return np.searchsorted(values, volume.ravel()).reshape(volume.shape) / values.size


def z_score(volume: np.ndarray) -> np.ndarray:
    """Return intensities by mean and SD of the foreground; the background goes below 0."""
    inside = volume[brain_mask(volume)]
    return (volume - inside.mean()) / inside.std()


def window(volume: np.ndarray) -> np.ndarray:
    """Return 8-bit grey values from 0 to the 99.5th percentile of the foreground, as pictures are made."""
    high = np.percentile(volume[brain_mask(volume)], 99.5)
    return np.round(np.clip((volume - volume.min()) / (high - volume.min()), 0, 1) * 255)


def crop(volume: np.ndarray, share: float) -> np.ndarray:
    """Return the box around the foreground, less `share` of it at the lower end of D and of H."""
    found = ndimage.find_objects(brain_mask(volume).astype(np.uint8))[0]
    cut = [int(share * (part.stop - part.start)) for part in found]
    return volume[found[0].start + cut[0] : found[0].stop, found[1].start + cut[1] : found[1].stop, found[2]]


def add_noise(volume: np.ndarray, share: float) -> np.ndarray:
    """Add Gaussian noise of `share` of the foreground's SD to what is not background."""
    noise = np.random.default_rng(0).normal(0, share * volume[brain_mask(volume)].std(), volume.shape)
    return volume + noise * (volume > volume.min())


def shift(volume: np.ndarray) -> np.ndarray:
    """Return a volume moved by one voxel along H and W, edge values repeated."""
    return np.pad(volume, ((0, 0), (1, 0), (1, 0)), mode="edge")[:, :-1, :-1]


DISGUISES: dict[str, Disguise] = {
    "resaved": lambda v: resave(v, np.int16 if (v == np.rint(v)).all() else np.float32),
    "float": lambda v: resave(v, np.float64),
    "rescaled intensity": lambda v: 0.37 * v + 12,
    "z-score": z_score,
    "8-bit window": window,
    "gamma 0.5": lambda v: unit(v) ** 0.5,
    "gamma 2": lambda v: unit(v) ** 2,
    "histogram equalised": equalise,
    "revised mask": lambda v: v,
    "one-voxel shift in plane": shift,
    "one-voxel shift along D": lambda v: np.concatenate([v[:1], v[:-1]]),
    "mirrored D": lambda v: v[::-1],
    "mirrored H": lambda v: v[:, ::-1],
    "mirrored W": lambda v: v[:, :, ::-1],
    "H and W swapped": lambda v: v.swapaxes(1, 2),
    "cropped to the head": lambda v: crop(v, 0.0),
    "cropped, 5 % cut off": lambda v: crop(v, 0.05),
    "cropped, 10 % cut off": lambda v: crop(v, 0.10),
    "noise 5 % of SD": lambda v: add_noise(v, 0.05),
    "noise 20 % of SD": lambda v: add_noise(v, 0.20),
    "half resolution in plane": lambda v: v[:, ::2, ::2],
    "turned by 5 degrees": lambda v: ndimage.rotate(v, 5, (1, 2), reshape=False, order=1, mode="nearest"),
}


def revise(labels: np.ndarray | None) -> np.ndarray | None:
    """Return labels with the first labelled voxel erased."""
    if labels is None or not labels.any():
        return labels
    revised = labels.copy()
    revised[tuple(np.argwhere(labels)[0])] = 0
    return revised


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def identify(scan: Scan) -> Identity:
    """Return the identity of a scan; the name is its case and its patient."""
    content = fingerprint(scan.intensities, scan.labels)
    case = SimpleNamespace(case_id=scan.name, patient_id=scan.name, aliases=(), fingerprint=content)
    volume = np.float32(scan.intensities)[None]
    return dataclasses.replace(identify_case(case), read_volume=lambda: normalise_volume(volume)[0][0])


def measure_disguise(name: str, scans: Sequence[Scan], known: Sequence[Identity]) -> dict[str, Any]:
    """Return recall by evidence, wrong finds, and the similarity to the same and to other scans."""
    own, others, evidence, wrong = [], [], [], 0
    stack = np.array([one.thumbnail for one in known])
    names = [one.case_id for one in known]
    for scan in scans:
        labels = revise(scan.labels) if name == "revised mask" else None
        changed = np.ascontiguousarray(DISGUISES[name](scan.intensities), dtype=np.float32)
        hidden = dataclasses.replace(identify(Scan(scan.name, changed, labels)), case_id="", patient_id="")
        for row in select_proven(find_leakage("", [hidden], known)).itertuples():
            evidence.append(row.evidence if row.training_case == scan.name else "wrong")
            wrong += row.training_case != scan.name
        compared = compare_thumbnails(hidden.thumbnail[None], stack)[0]
        own.append(compared[names.index(scan.name)])
        others.append(np.delete(compared, names.index(scan.name)).max())
    return {
        "disguise": name,
        "cases": len(scans),
        "recall": sum(kind != "wrong" for kind in evidence) / len(scans),
        "by_exact_image": evidence.count("exact image") / len(scans),
        "false_alarms": wrong,
        "own_similarity_min": float(min(own)),
        "own_similarity_median": float(np.median(own)),
        "other_similarity_max": float(max(others)),
    }


def measure_pairs(known: Sequence[Identity]) -> dict[str, Any]:
    """Return the false alarms among all pairs of different cases, and how alike these pairs are."""
    cells = np.array([one.thumbnail for one in known])
    upper = np.triu_indices(len(known), 1)
    values = compare_thumbnails(cells, cells)[upper]
    hashes = [one.image_sha256 for one in known] + [one.mask_sha256 for one in known if one.mask_sha256]
    near = int((values >= ALIKE).sum())
    return {
        "pairs": len(values),
        "false_alarms_near": near,
        "false_alarms_hash": len(hashes) - len(set(hashes)),
        "similarity_mean": float(values.mean()),
        "similarity_sd": float(values.std()),
        "similarity_highest": [float(value) for value in np.sort(values)[:-6:-1]],
    }


def measure_time(scans: Sequence[Scan]) -> dict[str, float]:
    """Return processor seconds of fingerprints and comparisons, the latter extrapolated to COHORTS."""
    started = time.process_time()
    for scan in scans:
        fingerprint(scan.intensities, scan.labels)
    per_case = (time.process_time() - started) / len(scans)
    cells = np.random.default_rng(0).integers(-127, 128, (COHORTS[0], GRID, GRID, GRID)).astype(np.int8)
    started = time.process_time()
    compare_thumbnails(cells[:64], cells)
    compare_s = (time.process_time() - started) * COHORTS[1] / 64
    return {
        "fingerprint_s_per_case": per_case,
        "fingerprint_s_1251_plus_335_cases": per_case * sum(COHORTS),
        "compare_s_1251_x_335": compare_s,
        "thumbnail_bytes_per_case": GRID**3,
    }


# ------------------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeakageConfig:
    """Settings of the measurement."""

    data_dir: tuple[str, ...] | None = None
    """folders of real cohorts; default: phantoms"""
    disguised: int = 1000
    """cases of each cohort to disguise at most, evenly taken"""
    phantoms: int = 24
    """phantoms in each style"""


def load_scans(config: LeakageConfig) -> dict[str, list[Scan]]:
    """Return the scans of each cohort."""
    if config.data_dir is None:
        cohorts: dict[str, list[Scan]] = {}
        for style in ("internal", "external"):
            cohorts[style] = []
            first = FIRST_ID[style]  # a seed gives the same head in both styles
            for seed in tqdm(range(first, first + config.phantoms), desc=f"{style} phantoms", leave=False):
                phantom = make_phantom(seed, (40, 120, 120), (4.0, 2.0, 2.0), style)
                volume = phantom.modalities["flair"].astype(np.float32)
                cohorts[style].append(Scan(f"{style} {seed}", volume, phantom.labels))
        return cohorts
    cohorts = {}
    for number, folder in enumerate(config.data_dir):
        cases = find_cases(CaseSource(folder))
        loaded = ((case, load_case(case)) for case in tqdm(cases, desc="reading", leave=False))
        cohorts[f"cohort {number + 1}"] = [
            Scan(case.case_id, one.volume[0], one.labels) for case, one in loaded
        ]
    return cohorts


def main(config: LeakageConfig) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    cohorts = load_scans(config)
    scans = [scan for cohort in cohorts.values() for scan in cohort]
    known = [identify(scan) for scan in tqdm(scans, desc="fingerprints", leave=False)]
    chosen = []
    for cohort in cohorts.values():
        count = min(config.disguised, len(cohort))
        chosen += [cohort[index] for index in np.linspace(0, len(cohort) - 1, count).round().astype(int)]
    rows = [measure_disguise(name, chosen, known) for name in tqdm(DISGUISES, desc="disguises", leave=False)]
    pairs = {"all": measure_pairs(known)}
    start = 0
    for name, cohort in cohorts.items():
        if len(cohort) > 1:
            pairs[name] = measure_pairs(known[start : start + len(cohort)])
        start += len(cohort)
    seconds = measure_time(chosen[:: max(1, len(chosen) // 12)])
    print_table(rows)
    print_table([{"pairs of": name, **row} for name, row in pairs.items()])
    print_table([seconds])
    content = {
        "threshold": ALIKE,
        "cases": {name: len(cohort) for name, cohort in cohorts.items()},
        "disguises": rows,
        "different_pairs": pairs,
        "processor_seconds": seconds,
    }
    print(write_result(f"leakage_{'phantom' if config.data_dir is None else 'real'}", content))


if __name__ == "__main__":
    run_command(main, LeakageConfig, "Measure recall and false alarms of the leakage check per disguise.")
