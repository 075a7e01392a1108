"""The audit in words: the printed table and the self-contained report.html. Numbers come from outside."""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils_v2 import write_atomically

PHANTOM_NOTE = "synthetic phantoms, not a BraTS result"
COLUMNS = (
    "cohort", "region", "mode", "cases / patients", "Dice per case", "95 % CI", "SD", "median", "precision",
    "recall", "HD95 mm", "slice Dice", "pooled Dice", "empty ref / pred",
)  # fmt: skip

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #20262d; max-width: 1120px;
  margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e3e7eb; white-space: nowrap; }
th { color: #5b6670; font-weight: 600; } td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left; }
td.head { font-weight: 700; } .wide { overflow-x: auto; } .quiet { color: #5b6670; }
.mark { background: #fff3d6; border-left: 4px solid #d99a1c; padding: .6rem .9rem; margin: 1rem 0; }
figure { margin: 1.2rem 0; } img { max-width: 100%; } figcaption { color: #5b6670; font-size: 13px; }
code { font-size: 12px; word-break: break-all; }
"""


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(ci95: Sequence[float] | None, style: str) -> str:
    return "none (one patient)" if ci95 is None else " to ".join(style.format(edge) for edge in ci95)


def summary_rows(summary: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of COLUMNS for each cohort, region and mode of a summary."""
    for cohort, regions in summary["cohorts"].items():
        for region, modes in regions.items():
            for mode in ("plain", "tta"):
                part = modes[mode]
                dice = part["dice"]
                undefined = [
                    f" ({part[m]['n_undefined']} undefined)" * bool(part[m]["n_undefined"])
                    for m in ("precision", "recall")
                ]
                yield (
                    cohort,
                    region,
                    "TTA" if mode == "tta" else "plain",
                    f"{part['n_cases']} / {part['n_patients']}",
                    _number(dice["mean"]),
                    _interval(dice["ci95"], "{:.3f}"),
                    _number(dice["sd"]),
                    _number(dice["median"]),
                    _number(part["precision"]["mean"]) + undefined[0],
                    _number(part["recall"]["mean"]) + undefined[1],
                    _number(part["hd95_mm"]["mean"], 1),
                    _number(part["dice_slice"]),
                    _number(part["dice_pooled"]),
                    f"{part['n_empty_reference']} / {part['n_empty_prediction']}",
                )


def gain_lines(summary: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence per cohort and region on what TTA changes."""
    for cohort, regions in summary["cohorts"].items():
        for region, modes in regions.items():
            gain = modes["tta_gain"]
            yield (
                f"TTA changes {cohort} {region} Dice per case by {gain['mean']:+.4f} "
                f"(95 % CI {_interval(gain['ci95'], '{:+.4f}')}, paired, n = {gain['n']})"
            )


def marks(summary: dict[str, Any]) -> list[str]:
    """Return the warnings that belong above the numbers."""
    found = []
    if summary["data_kind"] == "phantom":
        found.append(f"These are {PHANTOM_NOTE}.")
    for cohort, count in summary.get("seen_in_training", {}).items():
        if count["seen"]:
            rest = "" if count["unseen"] else "; the word does not fit it"
            found.append(
                f"{cohort}: {count['seen']} of {count['cases']} cases were in training or validation, "
                f"{count['unseen']} unseen: not a held-out result{rest}."
            )
    if "external_unseen" in summary["cohorts"]:
        found.append("external_unseen is the external cohort without the cases that were seen.")
    return found


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as text: warnings, a table, the TTA differences."""
    rows = [COLUMNS, *summary_rows(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    thresholds = ", ".join(f"{region} {value:.2f}" for region, value in summary["threshold"].items())
    return "\n".join(
        [
            *marks(summary),
            "",
            *lines,
            "",
            f"threshold, chosen on validation: {thresholds}",
            *gain_lines(summary),
        ]
    )


def _html_table(header: tuple[str, ...], rows: list[tuple[str, ...]], bold: int | None = None) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = (
            f"<td{' class=head' if i == bold else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row)
        )
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _worst_rows(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    tested = rows[(rows["cohort"] != "validation") & (rows["mode"] == "tta")]
    worst = (
        tested.sort_values("dice")
        .groupby(["cohort", "region"], sort=False)
        .head(3)
        .sort_values(["cohort", "region"])
    )
    return [
        (
            r.cohort,
            r.region,
            r.case,
            _number(r.dice),
            _number(r.hd95_mm, 1),
            _number(r.reference_ml, 1),
            _number(r.prediction_ml, 1),
        )
        for r in worst.itertuples()
    ]


def write_report(
    path: Path,
    run: Path,
    summary: dict[str, Any],
    rows: pd.DataFrame,
    leakage: pd.DataFrame,
    plots: dict[str, Path],
) -> None:
    """Write one HTML file that needs no other: warnings, numbers, plots (as data), leakage, provenance."""
    warnings = "".join(f'<p class="mark">{html.escape(text)}</p>' for text in marks(summary))
    gains = "".join(f"<li>{html.escape(line)}</li>" for line in gain_lines(summary))
    figures = ""
    for caption, plot in plots.items():
        data = base64.b64encode(plot.read_bytes()).decode()
        text = html.escape(caption)
        figures += f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        figures += f"<figcaption>{text}</figcaption></figure>\n"
    known = "<p>No tested case was found in training or validation by id, mapping or content.</p>"
    if len(leakage):
        known = _html_table(
            tuple(leakage.columns), [tuple(map(str, row)) for row in leakage.itertuples(index=False)]
        )
    thresholds = ", ".join(f"{region} {value:.2f}" for region, value in summary["threshold"].items())
    provenance = [
        (name, str(summary[name]))
        for name in ("command", "checkpoint_sha256", "split_sha256", "hardware", "versions")
    ]
    details = "".join(f"<p><b>{name}</b> <code>{html.escape(value)}</code></p>" for name, value in provenance)
    worst_header = ("cohort", "region", "case", "Dice", "HD95 mm", "reference ml", "prediction ml")
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Audit of {html.escape(run.name)}</title><style>{STYLE}</style>
<h1>Audit of {html.escape(run.name)}</h1>
<p class="quiet">DRUnet V2. For research, not for clinical use.</p>
{warnings}
<h2>Numbers</h2>
{_html_table(COLUMNS, list(summary_rows(summary)), bold=4)}
<p class="quiet">Dice per case: whole volume, native grid, then the mean over cases; the interval is a
bootstrap over patients. Slice Dice: mean over slices with reference tumour. Pooled Dice: all voxels of the
cohort together. Empty masks: both empty is Dice 1 and HD95 0, exactly one is Dice 0 and HD95 374 mm.
Threshold, chosen on validation:
{html.escape(thresholds)}.</p>
<ul>{gains}</ul>
<h2>Worst cases</h2>
{_html_table(worst_header, _worst_rows(rows), bold=3)}
<h2>Plots</h2>
{figures}
<h2>Leakage</h2>
{known}
<h2>Where this comes from</h2>
{details}
</html>
"""
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))
