"""The page of two runs compared: the difference, the scatter, and the cases that changed most."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from audit.browse import PAGE_BYTES
from audit.page import write_page
from audit.results import headline_mode
from audit.statistics import LEAST_PATIENTS, format_spread
from audit.viewed_pairs import embed_pairs

SIDE, EDGE = 300, 44  # of a scatter and of the room for its ticks, in SVG units
PAGE_OVERHEAD, ROW_BYTES = 300_000, 900  # of the page's parts and of a case in plot and table
TERMS = {
    "A": "mean over the common cases, of the run named first",
    "B": "mean over the common cases, of the run named second",
    "A - B": "mean of the paired differences; above 0 A is higher, "
    "which is worse for hd95_mm and lesion_hd95_mm",
    "95 % CI": "bootstrap over patients, both members of a pair drawn together; of fewer than six patients "
    "the range of the differences and their number",
    "sign-flip p": "two-sided p of the paired differences, by flipping the sign of each patient's",
    "cases / patients": "those that both audits tested",
}


def write_comparison_page(
    path: Path, comparison: Mapping[str, Any], paired: pd.DataFrame, table: pd.DataFrame
) -> None:
    """Write the page of what comparison.json holds; `paired` has a row per case, cohort, region and mode.

    `table` holds the formatted means and differences of every metric.
    """
    rows = paired[paired["mode"] == headline_mode(paired)].reset_index(drop=True)
    rows = rows.assign(change=rows["dice_a"] - rows["dice_b"])
    rows = rows.iloc[(-rows["change"].abs()).argsort(kind="stable")].reset_index(drop=True)
    runs = {name: Path(comparison[f"run_{name}"]) for name in "ab"}
    keys = list(rows[["cohort", "case"]].itertuples(index=False, name=None))
    budget = PAGE_BYTES - PAGE_OVERHEAD - ROW_BYTES * len(rows)
    pairs = embed_pairs(runs, comparison["masks_as_given"], keys, budget)
    write_page(
        path,
        "comparison.html.j2",
        names={name: run.name for name, run in runs.items()},
        links={name: link_run(run, path.parent) for name, run in runs.items()},
        comparison=comparison,
        marks=list_comparison_marks(comparison, bool(pairs)),
        pairs=[pair | {"about": describe_pair(rows, pair["key"])} for pair in pairs],
        shown={pair["key"] for pair in pairs},
        case_count=len(set(keys)),
        limit_mb=PAGE_BYTES // 1_000_000,
        mode=name_modes(comparison),
        cards=list_cards(comparison),
        panels=[
            draw_scatter(rows, cohort, region)
            for cohort, regions in comparison["cohorts"].items()
            for region in regions
        ],
        cases=list_cases(rows),
        table=table,
        terms=TERMS,
        side=SIDE,
        edge=EDGE,
        picture="comparison.png",
    )


def link_run(run: Path, folder: Path) -> dict[str, str]:
    """Return {name: link} from a comparison's folder to the pages of a run that are there."""
    places = {"run": run / "index.html", "report": run / "evaluation" / "report.html"}
    there = {name: path for name, path in places.items() if path.is_file()}
    return {name: Path(os.path.relpath(path, folder)).as_posix() for name, path in there.items()}


def describe_pair(rows: pd.DataFrame, key: str) -> str:
    """Return what the viewer says of a case: the Dice of both runs in each region."""
    of_case = rows[rows["cohort"] + "/" + rows["case"] == key]
    numbers = [f"{row.region} Dice A {row.dice_a:.3f}, B {row.dice_b:.3f}" for row in of_case.itertuples()]
    return f"{of_case['cohort'].iloc[0]}. {'; '.join(numbers)}"


def name_modes(comparison: Mapping[str, Any]) -> str:
    """Return in words which masks are compared."""
    given = [name.upper() for name, is_given in comparison["masks_as_given"].items() if is_given]
    if len(given) == 2:
        return "masks as given"
    return f"with TTA, masks of {given[0]} as given" if given else "with TTA"


def list_comparison_marks(comparison: Mapping[str, Any], shows_cases: bool) -> list[str]:
    """Return what qualifies the differences, in sentences."""
    marks = []
    if comparison["data_kind"] == "phantom":
        marks.append("Synthetic phantoms, not a BraTS result.")
    elif comparison["data_kind"] == "mixed":
        marks.append("Some of the cases are synthetic phantoms, not a BraTS result.")
    if comparison["data_kind"] != "phantom":
        what = "shows and names patients" if shows_cases else "names cases of patients"
        marks.append(f"Real data: this page {what}. Mind the terms of the data before you send it.")
    for name, is_given in comparison["masks_as_given"].items():
        if is_given:
            marks.append(
                f"The masks of {name.upper()} were made by another tool. What it was trained on is not known."
            )
    alone = {name: comparison[f"n_cases_only_{name}"] for name in "ab"}
    if any(alone.values()):
        marks.append(
            f"Not compared: {alone['a']} case(s) of A and {alone['b']} of B, on which the other was not "
            "tested, or which it had seen."
        )
    return marks


def list_cards(comparison: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the paired difference of Dice of each cohort and region, in figures and words."""
    cards = []
    for cohort, regions in comparison["cohorts"].items():
        for region, entry in regions.items():
            dice = entry["tta" if "tta" in entry else "plain"]["dice"]
            patients, difference = entry["n_patients"], dice["difference"]
            note = f"sign-flip p {difference['p_sign_flip']:.3g}"
            if patients < LEAST_PATIENTS:
                note += f"; of {patients} patient(s) it cannot be below {2 / 2**patients:.3g}"
            cards.append(
                {
                    "name": f"{cohort}, {region}",
                    "figure": f"{difference['mean']:+.4f}",
                    "spread": format_spread(difference, "{:+.4f}", "95 % CI "),
                    "p": note,
                    "means": f"A {dice['mean_a']:.4f}, B {dice['mean_b']:.4f}",
                    "n": f"{entry['n_cases']} cases of {patients} patients",
                }
            )
    return cards


def draw_scatter(rows: pd.DataFrame, cohort: str, region: str) -> dict[str, Any]:
    """Return where the dots, ticks and the diagonal of a panel lie, in SVG units; A goes up, B to the right.

    Each dot has the index of its row in the table of cases.
    """
    chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region)]
    lowest = float(chosen[["dice_a", "dice_b"]].to_numpy().min())
    low = max(0.0, float(np.floor(10 * lowest - 0.5) / 10))
    step = 0.1 if low >= 0.5 else 0.2
    ticks = np.arange(np.ceil(low / step - 1e-9), 1 / step + 1e-9) * step

    def place(dice: float) -> float:
        return round((dice - low) / (1 - low) * SIDE, 1)

    return {
        "name": f"{cohort}, {region}",
        "n": len(chosen),
        "dots": [
            {"row": row.Index, "x": EDGE + place(row.dice_b), "y": SIDE - place(row.dice_a)}
            | {"key": f"{cohort}/{row.case}", "region": region}
            | {"words": f"{row.case}: A {row.dice_a:.3f}, B {row.dice_b:.3f}, A - B {row.change:+.3f}"}
            for row in chosen.itertuples()
        ],
        "ticks": [{"at": place(tick), "words": f"{tick:.3g}"} for tick in ticks],
    }


def list_cases(rows: pd.DataFrame) -> Sequence[dict[str, Any]]:
    """Return the cells of the table of cases, in the order of the rows."""
    return [
        {
            "case": row.case,
            "key": f"{row.cohort}/{row.case}",
            "region": row.region,
            "place": f"{row.cohort} {row.region}",
            "cells": [
                f"{row.change:+.3f}", f"{row.dice_a:.3f}", f"{row.dice_b:.3f}", f"{row.hd95_mm_a:.1f}",
                f"{row.hd95_mm_b:.1f}", f"{row.reference_ml_a:.1f}",
            ],
        }
        for row in rows.itertuples()
    ]  # fmt: skip
