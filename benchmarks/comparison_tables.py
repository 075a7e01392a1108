"""The tables and plots of `compare_networks`: what its rows say, side by side."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from audit.statistics import compare_paired, format_spread, summarise
from benchmarks.common import print_table
from runtime.errors import InputError
from runtime.files import write_atomically

PLACES = ("home", "abroad")


def read_rows(folder: Path, entries: Sequence[str], folds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of some folds that are in a folder, by entry, in the order of `entries`."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    for path in sorted(folder.glob("*_fold*_seed*.json")):
        row = json.loads(path.read_text())
        if row["fold"] in folds:
            rows.setdefault(row["entry"], []).append(row)
    return {name: found for name, found in rows.items() if found}


def dice_of(rows: Sequence[dict[str, Any]], place: str, mode: str) -> pd.DataFrame:
    """Return Dice per case and region, the mean over folds and seeds that tested it, with its patient."""
    table = pd.concat([pd.DataFrame(row[place]) for row in rows])
    table = table[table["mode"] == mode]
    return table.groupby(["case", "patient", "region"], as_index=False)["dice"].mean()


def run_of(row: dict[str, Any]) -> tuple[int, int]:
    """Return what tells one run of an entry from another: fold and seed."""
    return row["fold"], row["seed"]


def shared_rows(
    one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of both whose fold and seed both have."""
    both = {run_of(row) for row in one} & {run_of(row) for row in other}
    return [row for row in one if run_of(row) in both], [row for row in other if run_of(row) in both]


def describe(summary: dict[str, Any], style: str) -> str:
    """Return mean, and interval or range, as text."""
    return f"{summary['mean']:{style}} ({format_spread(summary, '{:' + style + '}')})"


def describe_runs(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], place: str, region: str
) -> str:
    """Return the difference of the mean Dice with TTA of each run as text, in the order of `ours`."""
    partner = {run_of(row): row for row in theirs}
    changes = []
    for row in ours:
        means = [
            dice_of([each], place, "tta").groupby("region")["dice"].mean()
            for each in (row, partner[run_of(row)])
        ]
        changes.append(f"{means[0][region] - means[1][region]:+.3f}")
    return " ".join(changes)


def tabulate(rows: dict[str, list[dict[str, Any]]], region: str, reference: str) -> Iterator[dict[str, Any]]:
    """Yield a line per entry: Dice at home and abroad, its difference to `reference`, paired, and cost."""
    for name, own in rows.items():
        line: dict[str, Any] = {"network": name, "runs": len(own)}
        for place in PLACES:
            here = [row for row in own if row[place]]
            if not here:  # no other cohort was tested
                continue
            for mode in ("plain", "tta"):
                dice = dice_of(here, place, mode)
                dice = dice[dice["region"] == region]
                line[f"{place} {mode}"] = describe(summarise(dice["dice"], dice["patient"]), ".3f")
                line[f"n {place}"] = len(dice)
            if name != reference and reference in rows:
                ours, theirs = shared_rows(here, [row for row in rows[reference] if row[place]])
                if not ours:
                    continue
                keys = ["case", "patient", "region"]
                paired = dice_of(ours, place, "tta").merge(dice_of(theirs, place, "tta"), on=keys)
                paired = paired[paired["region"] == region]
                change = compare_paired(paired["dice_x"], paired["dice_y"], paired["patient"])
                line[f"{place} minus reference"] = describe(change, "+.3f")
                line[f"{place} p"] = round(change["p_sign_flip"], 4)
                if len(ours) > 1:  # the interval is over patients: what another seed does stands beside it
                    line[f"{place}, each run"] = describe_runs(ours, theirs, place, region)
        slabs, seconds = (sum(row[key] for row in own) for key in ("slabs", "seconds"))
        line |= {"slabs": slabs // len(own), "slabs/s": round(slabs / seconds, 1)}
        line |= {"M parameters": round(own[0]["parameters"] / 1e6, 2), "GFLOP": round(own[0]["gflop"], 2)}
        line |= {"activations GB": round(own[0]["activation_gb"], 2)}
        yield line


def group_near(positions: pd.Series, reach: float) -> list[list[int]]:
    """Return the indices of positions in groups, none wider than `reach`, from the lowest up."""
    groups: list[list[int]] = []
    for index in positions.sort_values().index:
        if groups and positions[index] - positions[groups[-1][0]] <= reach:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def spread_out(heights: np.ndarray, gap: float, top: float) -> np.ndarray:
    """Return rising heights at least `gap` apart, none above `top`: moved up where they can be, else down."""
    spread = heights.copy()
    for index in range(1, len(spread)):
        spread[index] = max(spread[index], spread[index - 1] + gap)
    ceilings = top - gap * np.arange(len(spread))[::-1]
    return np.minimum(spread, ceilings)


def number_dots(axis: Any, x: pd.Series, y: pd.Series, colours: np.ndarray, width: float) -> None:
    """Write beside each dot its number from 1, pushed apart where dots are near; `width` is that of log x."""
    height = y.max() - y.min() or 1
    for near in group_near(np.log(x), 0.08 * width):
        order = y[near].sort_values().index
        labels = spread_out(y[order].to_numpy(), 0.035 * height, y.max() + 0.03 * height)
        for number, label in zip(order, labels, strict=True):
            axis.annotate(
                str(number + 1),
                (x[number], y[number]),
                (x[number] * np.exp(0.06 * width), label),
                fontsize=7,
                color=colours[number],
                va="center",
                arrowprops={
                    "arrowstyle": "-",
                    "color": colours[number],
                    "linewidth": 0.5,
                    "shrinkA": 1,
                    "shrinkB": 3,
                },
            )


def plot_cost(path: Path, table: pd.DataFrame, region: str) -> None:
    """Draw Dice at home and abroad against GFLOP per slab."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = [place for place in PLACES if f"{place} tta" in table]
    shape = {"figsize": (2 + 5.5 * len(places), 5.5), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(1, len(places), **shape)
    is_ours = ~table["network"].str.startswith(("MONAI", "nnU-Net", "smp"))
    colours = np.where(is_ours, "#0072b2", "#d55e00")
    least = table["GFLOP"].min()
    width = max(np.log(table["GFLOP"].max() / least), 0.1)  # of the axis, which is logarithmic
    for axis, place in zip(axes[0], places, strict=True):
        dice = table[f"{place} tta"].str.split().str[0].astype(float)
        axis.scatter(table["GFLOP"], dice, s=26, color=colours)
        number_dots(axis, table["GFLOP"], dice, colours, width)
        axis.set_xscale("log")
        axis.set_xlim(least * np.exp(-0.05 * width), least * np.exp(1.2 * width))
        ticks = np.geomspace(least, least * np.exp(width), 5).round(2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("GFLOP per slab")
        axis.set_ylabel(f"{region} Dice per case with TTA, mean over the cases of the runs named")
        axis.set_title(place)
        axis.grid(alpha=0.3)
    # runs are of other seeds, or of other folds, which are other cases at home
    names = [
        f"{number + 1}  {row['network']}: runs {row['runs']}, "
        + ", ".join(f"n {row[f'n {place}']} {place}" for place in places)
        for number, row in enumerate(table.to_dict("records"))
    ]
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours]
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    write_atomically(path, lambda target: figure.savefig(target, format="png", dpi=130))
    pyplot.close(figure)


def show_tables(
    folder: Path, entries: Sequence[str], regions: Sequence[str], reference: str, folds: Sequence[int]
) -> None:
    """Print and write the table of each region over some folds, and draw it."""
    rows = read_rows(folder, entries, folds)
    if not rows:
        raise InputError(folder, "no row is there", "name some by --entries")
    if reference not in rows:
        raise InputError(
            f"--reference {reference!r}", f"{folder} has no such row", f"one of: {'; '.join(rows)}"
        )
    for region in regions:
        table = pd.DataFrame(list(tabulate(rows, region, reference)))
        print_table(table.to_dict("records"))
        path = folder / f"table_{region}.csv"
        write_atomically(path, lambda target, table=table: table.to_csv(target, index=False))
        plot_cost(folder / f"cost_{region}.png", table, region)
