"""What may be said of a set of per-case numbers: intervals, paired tests, agreement, calibration.

Cases of one patient are no independent draws, so whatever is resampled or permuted here is patients, never
cases. Pure functions of arrays; nothing here reads a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

BOOTSTRAP_DRAWS = 10_000
SIGN_FLIPS = 10_000  # random ones; where there are no more patterns than this, each is tried once
LEAST_PATIENTS = 6  # of an interval; a bootstrap of fewer draws the same few patients again and again
CALIBRATION_EDGES = np.linspace(0, 1, 21)


def _sum_by_patient(values: np.ndarray, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of values and the number of cases of each patient, sorted by patient."""
    _, group = np.unique(np.asarray(patients), return_inverse=True)
    return np.bincount(group, weights=values), np.bincount(group)


def _select(values: np.ndarray, patients: Sequence[str], mask: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the values in a mask, and the patients of these."""
    return values[mask], [patient for patient, keep in zip(patients, mask, strict=True) if keep]


def bootstrap_means(
    values: np.ndarray, patients: Sequence[str], draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> np.ndarray:
    """Return `draws` bootstrap means of per-case `values` (n,) of two or more patients; seeded.

    Patients are drawn, not cases: a drawn patient brings all its cases.
    """
    bootstrap = stats.bootstrap(
        _sum_by_patient(values, patients),
        lambda sums, cases, axis: sums.sum(axis) / cases.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=draws,
        method="percentile",
        rng=seed,
    )
    return bootstrap.bootstrap_distribution


def summarise(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Return mean, sd, median, range, ci95 (bootstrap over patients) and n of per-case values, NaN left out.

    sd is the sample standard deviation (n - 1), range the lowest and the highest value. What is not defined
    is None: sd of one case, ci95 of fewer than LEAST_PATIENTS patients, everything of no case.
    """
    array = np.asarray(values, float)
    defined = ~np.isnan(array)
    left_out = int((~defined).sum())
    if not defined.any():
        undefined = dict.fromkeys(("mean", "sd", "median", "range", "ci95"))
        return undefined | {"n": 0, "n_undefined": left_out}
    array, patients = _select(array, patients, defined)
    ci95 = None
    if len(set(patients)) >= LEAST_PATIENTS:
        edges = np.percentile(bootstrap_means(array, patients, seed=seed), [2.5, 97.5])
        ci95 = [float(edge) for edge in edges]
    return {
        "mean": float(array.mean()),
        "sd": float(array.std(ddof=1)) if len(array) > 1 else None,
        "median": float(np.median(array)),
        "range": [float(array.min()), float(array.max())],
        "ci95": ci95,
        "n": len(array),
        "n_undefined": left_out,
    }


def format_spread(summary: Mapping[str, Any], style: str, name: str = "") -> str:
    """Return the interval of `summarise` in a format style, after `name`; where it has none the range and n.

    A summary of an earlier version may hold neither: then n alone.
    """
    if summary["ci95"] is not None:
        return name + " to ".join(style.format(edge) for edge in summary["ci95"])
    if summary.get("range") is None:
        return f"n = {summary['n']}"
    return "range " + " to ".join(style.format(edge) for edge in summary["range"]) + f", n = {summary['n']}"


def sign_flip_p(differences: Sequence[float], patients: Sequence[str], seed: int = 0) -> float | None:
    """Return the two-sided p of paired per-case differences (n,) under flips of the sign, patient by patient.

    If neither of two methods were better, each patient's differences could as well have come with the other
    sign, all together. p is the share of sign patterns whose mean difference is at least as far from 0 as
    the one seen: over all 2^P patterns where these are at most 10,000 (13 patients), else over 10,000 seeded
    ones with the one seen counted among them. NaN differences are left out; None where none is left.
    """
    array = np.asarray(differences, float)
    defined = ~np.isnan(array)
    if not defined.any():
        return None
    sums, _ = _sum_by_patient(*_select(array, patients, defined))
    if len(sums) == 1:
        return 1.0  # both signs are as far from 0

    def distance(flipped: np.ndarray, axis: int) -> np.ndarray:
        # The mean over cases is the sum over a fixed number. The second term does not change with the signs.
        # SciPy lets rounding errors pass that are small relative to the statistic, so it must not be near 0.
        return abs(flipped.sum(axis)) + abs(flipped).sum(axis)

    test = stats.permutation_test(
        (sums,),
        distance,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        rng=seed,
    )
    return float(test.pvalue)


def compare_paired(
    first: Sequence[float], second: Sequence[float], patients: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Return the summary of the per-case differences first - second, with the sign-flip p as "p_sign_flip".

    The three run over the same cases in the same order; a case with NaN in either is left out and counted.
    The interval is a bootstrap over patients that draws both members of a pair together.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    return summarise(difference, patients, seed) | {"p_sign_flip": sign_flip_p(difference, patients, seed)}


def limits_of_agreement(differences: Sequence[float]) -> list[float] | None:
    """Return mean - 1.96 SD and mean + 1.96 SD of per-case differences; None below two of them.

    Bland and Altman 1986 (doi 10.1016/S0140-6736(86)90837-8). Within these about 95 % of the differences lie
    where they are normally distributed and do not change with size.
    """
    array = np.asarray(differences, float)
    if len(array) < 2:
        return None
    half = 1.96 * float(array.std(ddof=1))
    return [float(array.mean()) - half, float(array.mean()) + half]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return Spearman's rank correlation of two per-case numbers as "spearman", with its "n"; NaN left out.

    None below three cases, and where one of the two is the same for all.
    """
    pairs = np.array([first, second], float)  # (2, n)
    pairs = pairs[:, ~np.isnan(pairs).any(0)]
    n = pairs.shape[1]
    is_defined = n >= 3 and all(len(np.unique(values)) > 1 for values in pairs)
    return {"spearman": float(stats.spearmanr(*pairs).statistic) if is_defined else None, "n": n}


def reliability_counts(
    probability: np.ndarray, reference: np.ndarray, edges: np.ndarray = CALIBRATION_EDGES
) -> np.ndarray:
    """Return per bin of probability: voxels, sum of their probabilities, voxels of the reference; (B, 3).

    `probability` float and `reference` bool of one shape. Bins are closed below and open above, the last one
    closed. The counts of several cases add up.
    """
    bins = np.clip(np.digitize(probability.ravel(), edges) - 1, 0, len(edges) - 2)
    weights = (None, probability.ravel().astype(float), reference.ravel().astype(float))
    return np.stack([np.bincount(bins, weight, len(edges) - 1) for weight in weights], axis=1)


def summarise_calibration(counts: np.ndarray, edges: np.ndarray = CALIBRATION_EDGES) -> dict[str, Any]:
    """Return the expected calibration error and the reliability table of `reliability_counts`.

    The error is the mean over voxels of |mean probability - share of reference| of the voxel's bin (Guo et
    al. 2017, arXiv 1706.04599, equation 3, for a binary outcome); None without a voxel. As most voxels of a
    brain are far from any tumour and easy, it is small for any network that finds the tumour at all:
    `ece_uncertain` is the same over the voxels between the outermost bins.
    """
    voxels, probabilities, positives = counts.T
    filled = voxels > 0
    safe = np.where(filled, voxels, 1)
    mean, share = probabilities / safe, positives / safe
    gap = voxels * abs(mean - share)
    middle = slice(1, -1)
    return {
        "ece": float(gap.sum() / voxels.sum()) if filled.any() else None,
        "ece_uncertain": float(gap[middle].sum() / voxels[middle].sum()) if filled[middle].any() else None,
        "n_voxels": int(voxels.sum()),
        "n_voxels_uncertain": int(voxels[middle].sum()),
        "bin_edges": [round(float(edge), 6) for edge in edges],
        "voxels": voxels.astype(int).tolist(),
        "mean_probability": [float(v) if f else None for v, f in zip(mean, filled, strict=True)],
        "reference_share": [float(v) if f else None for v, f in zip(share, filled, strict=True)],
    }
