"""The audit in words: the printed table and the self-contained report.html. Numbers come from outside."""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from postprocess_v2 import describe_postprocessing
from utils_v2 import write_atomically

PHANTOM_NOTE = "synthetic phantoms, not a BraTS result"
COLUMNS = (
    "cohort", "region", "mode", "cases / patients", "Dice per case", "95 % CI", "SD", "median", "precision",
    "recall", "HD95 mm", "NSD 1 mm", "slice Dice", "pooled Dice", "empty ref / pred",
)  # fmt: skip
LESION_COLUMNS = (
    "cohort", "region", "mode", "lesion Dice", "95 % CI", "lesion HD95 mm", "lesions found / missed / false",
    "volume error ml", "SD", "limits of agreement",
)  # fmt: skip
RAW_COLUMNS = (
    "cohort", "region", "post-processing", "Dice per case", "HD95 mm", "NSD 1 mm", "lesion Dice",
    "lesion HD95 mm", "lesions found / missed / false",
)  # fmt: skip
CALIBRATION_COLUMNS = (
    "cohort", "region", "mode", "expected calibration error", "of the uncertain", "voxels of brain",
    "uncertain ones",
)  # fmt: skip

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #20262d; max-width: 1400px;
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
                    _number(part["nsd_1mm"]["mean"]),
                    _number(part["dice_slice"]),
                    _number(part["dice_pooled"]),
                    f"{part['n_empty_reference']} / {part['n_empty_prediction']}",
                )


def lesion_rows(summary: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of LESION_COLUMNS for each cohort, region and mode of a summary."""
    for cohort, regions in summary["cohorts"].items():
        for region, modes in regions.items():
            for mode in ("plain", "tta"):
                part = modes[mode]
                error = part["volume_error_ml"]
                yield (
                    cohort,
                    region,
                    "TTA" if mode == "tta" else "plain",
                    _number(part["lesion_dice"]["mean"]),
                    _interval(part["lesion_dice"]["ci95"], "{:.3f}"),
                    _number(part["lesion_hd95_mm"]["mean"], 1),
                    f"{part['lesions_tp']} / {part['lesions_fn']} / {part['lesions_fp']}",
                    f"{error['mean']:+.2f}",
                    _number(error["sd"], 2),
                    "-"
                    if error["limits_of_agreement"] is None
                    else "{:+.2f} to {:+.2f}".format(*error["limits_of_agreement"]),
                )


def gain_lines(summary: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence per cohort and region on what TTA and what post-processing change."""
    for key, name in (("tta_gain", "TTA"), ("postprocessing_gain", "Post-processing")):
        for cohort, regions in summary["cohorts"].items():
            for region, modes in regions.items():
                if key not in modes:
                    continue
                gain = modes[key]
                yield (
                    f"{name} changes {cohort} {region} Dice per case by {gain['mean']:+.4f} "
                    f"(95 % CI {_interval(gain['ci95'], '{:+.4f}')}, sign-flip p {gain['p_sign_flip']:.3g}, "
                    f"paired, n = {gain['n']})"
                )


def postprocessing_line(summary: dict[str, Any]) -> str:
    """Return in one sentence what is done to the masks after the threshold."""
    chosen = summary["postprocessing"]
    if chosen is None:
        return "post-processing: none in the checkpoint"
    text = describe_postprocessing(chosen["settings"])
    return f"post-processing, chosen on validation: {text}" + (
        "; plain and TTA are with it" if chosen["settings"] else ""
    )


def raw_rows(summary: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of RAW_COLUMNS: with TTA, without and with post-processing."""
    for cohort, regions in summary["cohorts"].items():
        for region, modes in regions.items():
            if "tta_raw" not in modes:
                continue
            for name, part in (("without", modes["tta_raw"]), ("with", modes["tta"])):
                yield (
                    cohort,
                    region,
                    name,
                    _number(part["dice"]["mean"]),
                    _number(part["hd95_mm"]["mean"], 1),
                    _number(part["nsd_1mm"]["mean"]),
                    _number(part["lesion_dice"]["mean"]),
                    _number(part["lesion_hd95_mm"]["mean"], 1),
                    f"{part['lesions_tp']} / {part['lesions_fn']} / {part['lesions_fp']}",
                )


def calibration_rows(summary: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of CALIBRATION_COLUMNS for each region and mode."""
    for region, modes in summary["calibration"].items():
        for mode, part in modes.items():
            yield (
                "validation",
                region,
                "TTA" if mode == "tta" else "plain",
                _number(part["ece"], 4),
                _number(part["ece_uncertain"], 4),
                f"{part['n_voxels']:,}",
                f"{part['n_voxels_uncertain']:,}",
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


def _text_table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as text: warnings, tables, what was chosen on validation, paired differences."""
    thresholds = ", ".join(f"{region} {value:.2f}" for region, value in summary["threshold"].items())
    return "\n".join(
        [
            *marks(summary),
            "",
            *_text_table(COLUMNS, summary_rows(summary)),
            "",
            *_text_table(LESION_COLUMNS, lesion_rows(summary)),
            "",
            *_text_table(CALIBRATION_COLUMNS, calibration_rows(summary)),
            "",
            f"threshold, chosen on validation: {thresholds}",
            postprocessing_line(summary),
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
    raw_table = list(raw_rows(summary))
    raw = _html_table(RAW_COLUMNS, raw_table, bold=3) if raw_table else ""
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
<h2>Lesions and volumes</h2>
{_html_table(LESION_COLUMNS, list(lesion_rows(summary)), bold=3)}
<p class="quiet">Lesion-wise by the BraTS 2023 rule, per case, then the mean over cases: the reference dilated
by 3 groups voxels into lesions (26-connected), lesions up to 50 mm3 are left out, each missed and each false
lesion counts Dice 0 and HD95 374 mm. Lesions are counted over the cohort. NSD: share of both surfaces within
1 mm of the other; both masks empty is 1, exactly one 0. Volume error: prediction minus reference, mean over
cases; limits of agreement: that mean and 1.96 SD.</p>
<h2>Post-processing</h2>
<p>{html.escape(postprocessing_line(summary))}.</p>
{raw}
<h2>Calibration</h2>
{_html_table(CALIBRATION_COLUMNS, list(calibration_rows(summary)), bold=3)}
<p class="quiet">Over the voxels of brain of all validation cases together, before post-processing; mean over
voxels of the gap between predicted probability and share of reference tumour in 20 equal bins. Most voxels
are healthy and easy, which makes it small; the uncertain ones are those from 0.05 to 0.95.</p>
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
