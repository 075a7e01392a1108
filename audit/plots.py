"""Charts of a run and of its audit. Every figure says over what its numbers are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axis import Axis, Tick
from matplotlib.figure import Figure
from matplotlib.text import Text

from audit.results import headline_mode
from audit.statistics import format_spread
from runtime.files import write_atomically
from runtime.log import log

mpl.use("Agg")  # files only: a terminal without a display is the usual place

REGION_COLOURS = {"WT": "#1f6f8b", "TC": "#d1793a", "ET": "#a43c5b"}
GREY = "#8a94a0"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG; a name with `$` in it is text and no formula, in UTF-8 or not."""
    for text in set(figure.findobj(Text)) - _tick_labels(figure):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="backslashreplace").decode())
    write_atomically(path, lambda target: figure.savefig(target, dpi=130))


def _tick_labels(figure: Figure) -> set[Text]:
    """Return the labels of all ticks; those of a logarithmic axis are formulas."""
    ticks = (tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in _ticks_of(axis))
    return {label for tick in ticks for label in (tick.label1, tick.label2)}


def _ticks_of(axis: Axis) -> list[Tick]:
    return [*axis.get_major_ticks(), *axis.get_minor_ticks()]


def try_to_draw(path: Path, draw: Callable[[], None]) -> None:
    """Call `draw`, which writes `path`; where that fails, warn and go on: a picture is worth no run."""
    try:
        draw()
    except Exception as error:
        log.warning("%s is not drawn (%s: %s)", path, type(error).__name__, " ".join(str(error).split()))


class Dots(NamedTuple):
    """Where the cases of a chart are: hovered they say which they are, clicked they open the viewer."""

    axes: mpl.axes.Axes
    x: Sequence[float]  # in the axes' units
    y: Sequence[float]
    rows: pd.DataFrame  # of metrics_per_case.csv, in the order of the points


SVG_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "drunet",
}  # text stays text; the same chart, the same file


def save_chart(figure: Figure, path: Path, dots: Sequence[Dots] = ()) -> None:
    """Write a figure as PNG and as SVG beside it; in the SVG an invisible circle says each dot's case."""
    save_figure(figure, path)
    figure.set_layout_engine("none")  # it is laid out by now, and that takes most of the time

    def write(target: Path) -> None:
        for text in figure.findobj(Text):  # a name that is no UTF-8: pixels take it, a text file does not
            text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())
        with mpl.rc_context(SVG_STYLE):
            figure.savefig(target, metadata={"Date": None})
        text = target.read_text(encoding="utf-8")
        circles = "".join(circle for each in dots for circle in _circles(figure, each))
        target.write_text(text.replace("</svg>", f"{circles}</svg>"), "utf-8", "backslashreplace")

    write_atomically(path.with_suffix(".svg"), write)


def _circles(figure: Figure, dots: Dots) -> list[str]:
    """Return an SVG circle per case, in points from the upper left corner as matplotlib's SVG has them."""
    points = dots.axes.transData.transform(np.column_stack([dots.x, dots.y]).astype(float))
    shares = figure.transFigure.inverted().transform(points)
    size = figure.get_size_inches() * 72
    radius = 5 if len(points) <= 40 else 3.5
    circles = []
    for (x, y), row in zip(shares * size, dots.rows.to_dict("records"), strict=True):
        if np.isfinite([x, y]).all():
            cohort = row["cohort"].removesuffix("_unseen")  # those cases are in external
            key, region = quoteattr(f"{cohort}/{row['case']}"), quoteattr(row["region"])
            words = escape(f"{row['case']}, {cohort}: {row['region']} Dice {row['dice']:.3f}")
            circles.append(
                f'<circle class="dot" data-case={key} data-region={region} cx="{x:.1f}" '
                f'cy="{size[1] - y:.1f}" r="{radius}" fill-opacity="0"><title>{words}</title></circle>\n'
            )
    return circles


def tidy(axes: mpl.axes.Axes) -> None:
    """Take off the upper and right frame and draw a quiet grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_curves(
    path: Path, log: pd.DataFrame, title: str, save: Callable[[Figure, Path], None] = save_figure
) -> None:
    """Draw a run's log: loss, Dice (training slabs and validation cases) and learning rate over epochs."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, dice, rate = figure.subplots(1, 3)
    loss.plot(log["epoch"], log["train_loss"], color="#333c47", marker=".")
    loss.set_ylabel("training loss")
    dice.plot(log["epoch"], log["train_dice"], color=GREY, linestyle="--", label="training slabs, pooled")
    for column in log.columns[log.columns.str.startswith("validation_dice_")]:
        region = column.removeprefix("validation_dice_")
        dice.plot(
            log["epoch"],
            log[column],
            color=REGION_COLOURS[region],
            marker=".",
            label=f"{region}, mean over cases",
        )
        highest = log[column].idxmax()
        dice.annotate(
            f"{log[column][highest]:.3f}",
            (log["epoch"][highest], log[column][highest]),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=8,
        )
    dice.set_ylabel("Dice at probability 0.5")
    dice.set_ylim(0, 1)
    dice.legend(frameon=False, loc="lower right", fontsize=8)
    rate.semilogy(log["epoch"], log["learning_rate"], color="#333c47", marker=".", drawstyle="steps-post")
    rate.set_ylabel("learning rate")
    for axes in (loss, dice, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        tidy(axes)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save(figure, path)


def plot_balance(before: pd.Series, after: pd.Series, path: Path) -> None:
    """Draw the share of each slice kind (the series' index) before and after weighting."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(before))
    for offset, shares, label, colour in (
        (-0.2, before, "as stored", GREY),
        (0.2, after, "as drawn", "#1f6f8b"),
    ):
        bars = axes.bar(positions + offset, shares, 0.38, label=label, color=colour)
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=9)
    axes.set_xticks(positions, [f"{kind} slices" for kind in before.index])
    axes.set_ylabel("share of slices")
    axes.set_ylim(0, min(1.1, max(before.max(), after.max()) * 1.2))
    axes.legend(frameon=False)
    tidy(axes)
    save_figure(figure, path)


COHORT_COLOURS = {
    "internal": "#1f6f8b",
    "external": "#d1793a",
    "external_unseen": "#7a5195",
    "validation": GREY,
    "predictions": "#2f6f4f",
}


MODE_NOTE = {"tta": ", with TTA", "plain": ""}  # what a title says of the mode it shows


def _panels(
    rows: pd.DataFrame, width: float, height: float
) -> tuple[Figure, dict[tuple[str, str], mpl.axes.Axes]]:
    """Return a figure with one panel per (cohort, region): regions down, cohorts across."""
    cohorts, regions = list(rows["cohort"].unique()), list(rows["region"].unique())
    size = (width * len(cohorts), height * len(regions))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(regions), len(cohorts), squeeze=False)
    axes = {(c, r): grid[i][j] for i, r in enumerate(regions) for j, c in enumerate(cohorts)}
    return figure, axes


def plot_dice_per_case(path: Path, rows: pd.DataFrame, cohorts: dict, note: str) -> None:
    """Draw the Dice of each case with TTA, sorted, with the mean and its bootstrap 95 % interval, if any."""
    mode = headline_mode(rows)
    figure, panels = _panels(rows, 5.2, 3.4)
    dots = []
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == mode)]
        chosen = chosen.sort_values("dice", ascending=False, kind="stable")
        values = chosen["dice"].to_numpy()
        dots.append(Dots(axes, np.arange(1, len(values) + 1), values, chosen))
        summary = cohorts[cohort][region][mode]["dice"]
        colour = COHORT_COLOURS[cohort]
        if summary["ci95"]:
            label = "95 % interval of the mean"
            axes.axhspan(*summary["ci95"], color=colour, alpha=0.15, linewidth=0, label=label)
        else:
            axes.plot([], [], " ", label=format_spread(summary, "{:.3f}"))
        axes.axhline(summary["mean"], color=colour, linewidth=1.2, label=f"mean {summary['mean']:.3f}")
        axes.axhline(
            summary["median"],
            color=colour,
            linewidth=1,
            linestyle=":",
            label=f"median {summary['median']:.3f}",
        )
        axes.plot(
            np.arange(1, len(values) + 1), values, "o", color=colour, markersize=4 if len(values) > 40 else 6
        )
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.set_xlabel(f"case, best to worst (n = {len(values)})")
        axes.set_ylabel(f"{region} Dice per case")
        axes.set_title(cohort, fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        tidy(axes)
    figure.suptitle(f"Dice per case{MODE_NOTE[mode]}{note}", fontsize=11)
    save_chart(figure, path, dots)


def plot_dice_against_volume(path: Path, rows: pd.DataFrame, note: str) -> None:
    """Draw Dice with TTA against the reference volume in ml, on a logarithmic axis; empty ones counted."""
    mode = headline_mode(rows)
    figure, panels = _panels(rows, 5.2, 3.4)
    dots = []
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == mode)]
        present = chosen["reference_ml"] > 0
        shown = chosen[present]
        dots.append(Dots(axes, shown["reference_ml"], shown["dice"], shown))
        axes.scatter(
            shown["reference_ml"], shown["dice"], color=COHORT_COLOURS[cohort], s=26, alpha=0.85, linewidths=0
        )
        for row in shown.nsmallest(2, "dice").itertuples():
            left = row.reference_ml > shown["reference_ml"].median()
            label = axes.annotate(
                row.case if len(row.case) <= 30 else f"{row.case[:29]}\u2026",
                (row.reference_ml, row.dice),
                fontsize=7,
                color="#50585f",
                ha="right" if left else "left",
                textcoords="offset points",
                xytext=(-6 if left else 6, -2),
                parse_math=False,  # a name may hold dollar signs
            )
            label.set_in_layout(False)  # a long name takes no room from the axes
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks(mpl.ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.set_ylim(-0.02, 1.02)
        empty = int((~present).sum())
        axes.set_xlabel("reference volume in ml" + (f" ({empty} empty left out)" if empty else ""))
        axes.set_ylabel(f"{region} Dice per case")
        axes.set_title(f"{cohort}, n = {len(shown)}", fontsize=10)
        tidy(axes)
    figure.suptitle(f"Dice against tumour volume{MODE_NOTE[mode]}{note}", fontsize=11)
    save_chart(figure, path, dots)


def plot_dice_against_uncertainty(
    path: Path, rows: pd.DataFrame, cohorts: dict, note: str, is_of_folds: bool = False
) -> None:
    """Draw Dice with TTA against the column `uncertainty`, with the rank correlation; empty masks open.

    Where the rows are of folds, external cases have the spread over the networks.
    """
    figure, panels = _panels(rows, 5.2, 3.4)
    dots = []
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == "tta")]
        dots.append(Dots(axes, chosen["uncertainty"], chosen["dice"], chosen))
        is_empty = chosen["prediction_ml"] == 0
        colour = COHORT_COLOURS[cohort]
        for shown, fill in ((chosen[~is_empty], colour), (chosen[is_empty], "none")):
            axes.scatter(shown["uncertainty"], shown["dice"], s=26, edgecolors=colour, facecolors=fill)
        found = cohorts[cohort][region]["uncertainty_and_dice"]
        known = "undefined" if found["spearman"] is None else f"{found['spearman']:+.2f}"
        axes.set_xlim(0, 1.08 * max(chosen["uncertainty"].fillna(0).max(), 1e-3))
        axes.set_ylim(-0.02, 1.02)
        over = "networks" if is_of_folds and cohort != "internal" else "views of TTA"
        axes.set_xlabel(f"SD over the {over}, mean over predicted voxels")
        axes.set_ylabel(f"{region} Dice per case")
        axes.set_title(f"{cohort}: rank correlation {known}, n = {found['n']}", fontsize=10)
        tidy(axes)
    figure.suptitle(f"Dice against uncertainty, with TTA{note}", fontsize=11)
    save_chart(figure, path, dots)


def plot_precision_recall(
    path: Path,
    counts: dict[str, np.ndarray],
    used: dict[str, float],
    thresholds: np.ndarray,
    note: str,
) -> None:
    """Draw precision against recall over thresholds; `counts` is {cohort: (R, T, 3) pooled TP, FP, FN}.

    `used` is {region: the threshold in use}.
    """
    figure = Figure(figsize=(4.8 * len(used), 4.2), layout="constrained")
    grid = figure.subplots(1, len(used), squeeze=False)[0]
    for index, (region, threshold) in enumerate(used.items()):
        axes = grid[index]
        for cohort, table in counts.items():
            tp, fp, fn = table[index].T
            precision, recall = tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1)
            style = "--" if cohort == "validation" else "-"
            axes.plot(
                recall, precision, style, color=COHORT_COLOURS[cohort], marker=".", markersize=4, label=cohort
            )
            chosen = int(np.argmin(abs(thresholds - threshold)))
            axes.plot(
                recall[chosen],
                precision[chosen],
                "o",
                markersize=9,
                markerfacecolor="none",
                color=COHORT_COLOURS[cohort],
            )
        axes.set_xlabel("recall, voxels pooled")
        axes.set_ylabel("precision, voxels pooled")
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.01)
        axes.set_title(f"{region}, ring at threshold {threshold:.2f}", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        tidy(axes)
    figure.suptitle(f"Precision and recall, with TTA\n{note.strip()}".rstrip(), fontsize=11)
    save_chart(figure, path)


def plot_tta_gain(path: Path, rows: pd.DataFrame, cohorts: dict, note: str) -> None:
    """Draw Dice with TTA minus Dice without per case, sorted, with the mean and its 95 % interval, if any."""
    figure, panels = _panels(rows, 5.2, 3.2)
    dots = []
    for (cohort, region), axes in panels.items():
        of_panel = rows[(rows["cohort"] == cohort) & (rows["region"] == region)]
        chosen = of_panel.pivot(index="case", columns="mode", values="dice")
        gains = (chosen["tta"] - chosen["plain"]).sort_values(ascending=False, kind="stable")
        gain = gains.to_numpy()
        with_tta = of_panel[of_panel["mode"] == "tta"].set_index("case", drop=False).loc[gains.index]
        dots.append(Dots(axes, np.arange(1, len(gain) + 1), gain, with_tta))
        summary = cohorts[cohort][region]["tta_gain"]
        axes.axhline(0, color="#333c47", linewidth=0.8)
        axes.bar(
            np.arange(1, len(gain) + 1), gain, color=np.where(gain >= 0, "#2a9d74", "#c8553d"), width=0.8
        )
        axes.axhline(summary["mean"], color=COHORT_COLOURS[cohort], linewidth=1.2)
        title = f"{cohort}: mean {summary['mean']:+.4f}"
        if summary["ci95"]:
            axes.axhspan(*summary["ci95"], color=COHORT_COLOURS[cohort], alpha=0.18, linewidth=0, zorder=0)
        title += ", " + format_spread(summary, "{:+.4f}", "95 % interval ")
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.set_xlim(0.4, len(gain) + 0.6)
        axes.set_xlabel(f"case, most to least gain (n = {len(gain)})")
        axes.set_ylabel(f"{region} Dice, TTA - plain")
        tidy(axes)
    figure.suptitle(f"What test-time augmentation changes{note}", fontsize=11)
    save_chart(figure, path, dots)


def plot_bland_altman(path: Path, rows: pd.DataFrame, cohorts: dict, note: str) -> None:
    """Draw the volume error in ml against the mean of prediction and reference, with limits of agreement."""
    mode = headline_mode(rows)
    figure, panels = _panels(rows, 5.2, 3.4)
    dots = []
    for (cohort, region), axes in panels.items():
        chosen = rows[(rows["cohort"] == cohort) & (rows["region"] == region) & (rows["mode"] == mode)]
        colour = COHORT_COLOURS[cohort]
        error = cohorts[cohort][region][mode]["volume_error_ml"]
        axes.axhline(0, color="#333c47", linewidth=0.8)
        axes.axhline(error["mean"], color=colour, linewidth=1.4, label=f"mean {error['mean']:+.1f} ml")
        if error["ci95"]:
            axes.axhspan(*error["ci95"], color=colour, alpha=0.15, linewidth=0, label="95 % interval of it")
        else:
            axes.plot([], [], " ", label=format_spread(error, "{:+.1f} ml"))
        if limits := error["limits_of_agreement"]:
            label = "limits of agreement {:+.1f} and {:+.1f} ml".format(*limits)
            for edge in limits:
                axes.axhline(edge, color=colour, linewidth=1, linestyle="--", label=label)
                label = None
        mean_ml = (chosen["prediction_ml"] + chosen["reference_ml"]) / 2
        dots.append(Dots(axes, mean_ml, chosen["volume_error_ml"], chosen))
        axes.scatter(mean_ml, chosen["volume_error_ml"], color=colour, s=26, alpha=0.85, linewidths=0)
        reach = 1.15 * max(
            [*map(abs, error["limits_of_agreement"] or []), *abs(chosen["volume_error_ml"]), 0.1]
        )
        axes.set_ylim(-reach, reach * 1.55)  # room for the legend
        axes.set_xlim(left=0)
        axes.set_xlabel("mean of prediction and reference in ml")
        axes.set_ylabel(f"{region} prediction - reference in ml")
        axes.set_title(f"{cohort}, n = {len(chosen)}", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        tidy(axes)
    figure.suptitle(f"Volume error per case (Bland-Altman){MODE_NOTE[mode]}{note}", fontsize=11)
    save_chart(figure, path, dots)


def plot_reliability(path: Path, calibration: dict, note: str) -> None:
    """Draw, per region, the share of reference tumour over predicted probability, and each bin's voxels."""
    figure = Figure(figsize=(4.8 * len(calibration), 5.0), layout="constrained")
    grid = figure.subplots(2, len(calibration), squeeze=False, sharex=True, height_ratios=(3, 1))
    for column, (region, modes) in enumerate(calibration.items()):
        upper, lower = grid[:, column]
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=":", label="perfect calibration")
        edges = np.array(modes["tta"]["bin_edges"])
        centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        colour = REGION_COLOURS[region]
        for offset, mode, name, style, fill in (
            (-0.22, "plain", "plain", "--", GREY),
            (0.22, "tta", "TTA", "-", colour),
        ):
            part = modes[mode]
            filled = [i for i, value in enumerate(part["mean_probability"]) if value is not None]
            upper.plot(
                [part["mean_probability"][i] for i in filled],
                [part["reference_share"][i] for i in filled],
                style,
                color=fill,
                marker=".",
                label=f"{name}, ECE {part['ece']:.4f}" if filled else name,
            )
            lower.bar(centres + offset * width, part["voxels"], 0.42 * width, color=fill)
        upper.set_ylim(-0.02, 1.02)
        upper.set_xlim(-0.01, 1.01)
        upper.set_ylabel("share of reference tumour")
        upper.set_title(f"{region}, {modes['tta']['n_voxels']:,} voxels of brain", fontsize=10)
        upper.legend(frameon=False, fontsize=8, loc="upper left")
        lower.set_yscale("log")
        lower.set_ylim(bottom=0.7)
        lower.set_ylabel("voxels")
        lower.set_xlabel("predicted probability")
        tidy(upper)
        tidy(lower)
    figure.suptitle(
        f"Calibration on validation (ECE: expected calibration error)\n{note.strip()}".rstrip(), fontsize=11
    )
    save_chart(figure, path)


def plot_comparison(
    path: Path, paired: pd.DataFrame, cohorts: dict, names: tuple[str, str], note: str
) -> None:
    """Draw the Dice of run A against that of run B per case (TTA, if any); above the diagonal A is better.

    `paired` has the columns dice_a and dice_b beside those of `rows`; `cohorts` is that part of
    comparison.json.
    """
    mode = headline_mode(paired)
    paired = paired[paired["mode"] == mode]
    figure, panels = _panels(paired, 4.4, 4.4)
    for (cohort, region), axes in panels.items():
        chosen = paired[(paired["cohort"] == cohort) & (paired["region"] == region)]
        difference = cohorts[cohort][region][mode]["dice"]["difference"]
        values = chosen[["dice_a", "dice_b"]].to_numpy()
        low = max(-0.02, float(np.floor(10 * values.min() - 0.5) / 10))
        axes.plot([low, 1], [low, 1], color=GREY, linewidth=0.9)
        axes.scatter(
            values[:, 1], values[:, 0], color=COHORT_COLOURS[cohort], s=28, alpha=0.85, linewidths=0, zorder=3
        )
        axes.set_xlim(low, 1.01)
        axes.set_ylim(low, 1.01)
        axes.set_aspect("equal")
        axes.set_xlabel(f"{region} Dice, B: {names[1]}")
        axes.set_ylabel(f"{region} Dice, A: {names[0]}")
        title = f"{cohort}, n = {len(chosen)}: A - B {difference['mean']:+.4f}"
        title += "\n" + format_spread(difference, "{:+.4f}", "95 % interval ")
        title += f", sign-flip p {difference['p_sign_flip']:.3g}"
        axes.set_title(title, fontsize=10)
        tidy(axes)
        axes.grid(axis="x", color="#e6e9ec", linewidth=0.8)
    figure.suptitle(f"Dice per case{note}".replace(" (", "\n("), fontsize=11)
    save_figure(figure, path)
