"""Cases with the predictions of two runs, for one viewer: put together from what both reports hold.

An audit keeps masks in its report alone (audit/browse.py packs them), so what neither `report.html` nor a
page of `--browse all` holds cannot be shown.
"""

import base64
import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audit.browse import pack_volume, size_of, tested_rows
from runtime.tables import read_table

PACKED = re.compile(r'<script type="application/json"[^>]*>(.*?)</script>', re.DOTALL)
Packed = dict[str, Any]  # as browse.pack_case returns it


def open_report(run: Path) -> Callable[[str], Packed | None]:
    """Return a function from a key, "cohort/case", to the packed case that a run's report holds, or None.

    A report older than the numbers beside it is of another audit and holds nothing.
    """
    folder = run / "evaluation"
    report, metrics = folder / "report.html", folder / "metrics_per_case.csv"
    if not report.is_file() or report.stat().st_mtime < metrics.stat().st_mtime:
        return lambda _: None
    embedded = {case["key"]: case for case in read_packed(report)}
    tested = tested_rows(read_table(metrics, dtype={"case": str, "patient": str}))
    cases = tested[["cohort", "case"]].drop_duplicates().itertuples(index=False)
    pages = {f"{cohort}/{case}": f"{number:04d}.html" for number, (cohort, case) in enumerate(cases, 1)}

    def find_case(key: str) -> Packed | None:
        page = folder / "cases" / pages.get(key, "none")
        if key not in embedded and page.is_file():
            return next((case for case in read_packed(page) if case["key"] == key), None)
        return embedded.get(key)

    return find_case


def read_packed(page: Path) -> list[Packed]:
    """Return the cases that a page holds."""
    cases = [json.loads(text) for text in PACKED.findall(page.read_text(encoding="utf-8"))]
    return [case for case in cases if isinstance(case, dict) and "masks" in case]


def embed_pairs(
    runs: Mapping[str, Path], given: Mapping[str, bool], keys: Sequence[tuple[str, str]], budget: int
) -> list[Packed]:
    """Return the cases, in the order of `keys` (cohort, case), that both reports hold, up to `budget` bytes.

    `runs` and `given` (whether a run's masks are another tool's) are by the names "a" and "b".
    """
    reports = {name: open_report(run) for name, run in runs.items()}
    pairs = []
    for cohort, case_id in dict.fromkeys(keys):
        packed = {
            name: reports[name](f"{'predictions' if given[name] else cohort}/{case_id}") for name in "ab"
        }
        if packed["a"] is None or packed["b"] is None:
            continue
        pair = join_pair(packed["a"], packed["b"])
        if pair is None:
            continue
        pair |= {"key": f"{cohort}/{case_id}", "about": cohort}
        if size_of(pair) > budget:
            break
        budget -= size_of(pair)
        pairs.append(pair)
    return pairs


def join_pair(first: Packed, second: Packed) -> Packed | None:
    """Return a packed case with the reference and both predictions; None where it is not the same reference.

    Regions are those that both have. The embedded part of the grid is the one that holds both parts.
    """
    regions = [region for region in first["regions"] if region in second["regions"]]
    if not regions or first["spacing_mm"] != second["spacing_mm"]:
        return None
    boxes = [(np.array(case["offset"]), np.array(case["shape"])) for case in (first, second)]
    start = np.minimum(*(offset for offset, _ in boxes))
    shape = tuple(np.maximum(*(offset + size for offset, size in boxes)) - start)
    places = [
        tuple(slice(low, low + size) for low, size in zip(offset - start, sizes, strict=True))
        for offset, sizes in boxes
    ]
    layers = []  # (reference, prediction) of each case
    for case, place in zip((first, second), places, strict=True):
        masks = _unpack(case["masks"], (len(case["layers"]), *case["shape"]))
        whole = np.zeros((2, *shape), np.uint8)
        whole[(slice(None), *place)] = _select_regions(masks[:2], case["regions"], regions)
        layers.append(whole)
    (reference, prediction_a), (other, prediction_b) = layers
    if not np.array_equal(reference, other):
        return None
    differs = (prediction_a != prediction_b).sum((1, 2))
    return {
        "name": first["name"],
        "notes": [],
        "regions": regions,
        "shape": [int(side) for side in shape],
        "offset": [int(side) for side in start],
        "spacing_mm": first["spacing_mm"],
        "start": int(differs.argmax()) if differs.any() else int(reference.any((1, 2)).argmax()),
        "layers": ["reference", "A", "B"],
        "images": _join_images(first, second, places, shape),
        "masks": pack_volume(np.stack([reference, prediction_a, prediction_b])),
        "probability": "",
        "steps": first["steps"],
        "more": False,
    }


def _select_regions(bits: np.ndarray, regions: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Return volumes of a bit per region with the bits of `wanted`, in that order."""
    selected = np.zeros_like(bits)
    for place, region in enumerate(wanted):
        selected |= ((bits >> regions.index(region)) & 1) << place
    return selected


def _join_images(
    first: Packed, second: Packed, places: Sequence[tuple[slice, ...]], shape: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the images of the first case, on the part of the grid that only the second has from there."""
    images = []
    others = {image["name"]: image for image in second["images"]}
    for image in first["images"]:
        voxels = np.zeros(shape, np.uint8)
        if image["name"] in others:
            voxels[places[1]] = _unpack(others[image["name"]]["voxels"], second["shape"])
        voxels[places[0]] = _unpack(image["voxels"], first["shape"])
        images.append({"name": image["name"], "window": image["window"], "voxels": pack_volume(voxels)})
    return images


def _unpack(text: str, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape)
