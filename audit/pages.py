"""The pages that lead to everything: one of each run, and one of all runs.

    results/<run>/index.html      curves, split, balance, settings, first batch, headline of the audit
    results/<run>/MODEL_CARD.md   the same in the form that hubs expect
    results/index.html            all runs, newest first

Training and the audit write them when they end. Pages and cards hold numbers and counts and name no case; the
first batch is a picture of cases.
"""

import base64
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from audit.model_card import make_card
from audit.page import write_page
from audit.runs import RunFacts, find_runs, list_folds, read_run
from audit.statistics import LEAST_PATIENTS, format_spread
from runtime.files import file_sha256, is_written_by_us, write_output
from runtime.log import log
from runtime.tables import read_table

INDEX = "index.html"
CARD = "MODEL_CARD.md"
SHOWN_SETTINGS = (
    "data_dir", "modalities", "regions", "context", "size", "widths", "epochs", "max_minutes", "batch_size",
    "learning_rate", "seed", "device",
)  # fmt: skip


def write_run_pages(folder: Path) -> None:
    """Write a run's page and model card, and the page of all runs beside it; of a fold those of its run too.

    Nothing here may cost a run or an audit that is done: what cannot be written is warned of.
    """
    write_pages_of(folder)
    if list_folds(folder.parent):
        folder = folder.parent
        write_pages_of(folder)
    write_index(folder.parent)


def write_pages_of(folder: Path) -> None:
    """Write a run's page and model card; what cannot be written is warned of."""
    run = attempt(folder, lambda: read_run(folder))
    if run is not None:
        attempt(folder / CARD, lambda: write_ours(folder / CARD, lambda path: write_card(path, run)))
        attempt(folder / INDEX, lambda: write_ours(folder / INDEX, lambda path: write_run_page(path, run)))


def write_index(results: Path) -> None:
    """Write the page of all runs in a folder; what cannot be written is warned of."""
    path = results / INDEX
    if attempt(path, lambda: write_ours(path, lambda target: write_index_page(target, results))):
        log.info("all runs: %s", path)


def attempt(place: Path, action: Callable[[], Any]) -> Any:
    """Return what `action` does, or None after a warning where it fails."""
    try:
        return action()
    except Exception as error:  # a page is never worth the run it is of
        log.warning("%s: not written (%s: %s)", place, type(error).__name__, error)
        return None


def write_ours(path: Path, write: Callable[[Path], None]) -> bool:
    """Write a file that people may have changed or may have put there themselves; False: theirs is kept."""
    if path.exists() and not is_written_by_us(path):
        log.warning("%s is not as this program wrote it and is kept; move it away for a new one", path)
        return False
    write_output(path, write)
    return True


def write_card(path: Path, run: RunFacts) -> None:
    """Write a run's model card."""
    path.write_text(make_card(run), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------


def write_run_page(path: Path, run: RunFacts) -> None:
    """Write the page of one run; it needs no other file."""
    config = run.config or {}
    settings = {name: show_value(value) for name, value in run.settings.items()}
    write_page(
        path,
        "run.html.j2",
        run=run,
        above="all folds" if list_folds(run.folder.parent) else "all runs",
        figures=read_figures(run),
        balance=read_balance(run.folder / "balance.csv"),
        settings={name: settings[name] for name in SHOWN_SETTINGS if name in settings},
        all_settings=settings,
        keeps_last=config.get("keep") == "last",
        config=config,
        provenance=list_provenance(run),
        card=make_card(run),
        has_report=(run.folder / "evaluation" / "report.html").is_file(),
    )


def read_figures(run: RunFacts) -> dict[str, str]:
    """Return {name: PNG in base64} of curves and first batch, "" for one that is not there."""
    paths = {name: run.folder / f"{name}.png" for name in ("curves", "batch")}
    return {
        name: base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
        for name, path in paths.items()
    }


def read_balance(path: Path) -> list[dict[str, Any]]:
    """Return kind, slices and shares (stored, drawn) of the training slices; empty where no file says."""
    if not path.is_file():
        return []
    table = read_table(path).astype({"slices": int, "stored": float, "drawn": float})
    return table.to_dict("records")


def show_value(value: Any) -> str:
    """Return a setting as a person would type it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def list_provenance(run: RunFacts) -> dict[str, Any]:
    """Return commands, hashes, hardware and versions of a run and of its audit."""
    config, summary, best = run.config or {}, run.summary or {}, run.folder / "best.pt"
    provenance = {
        "training command": "\n".join(run.commands) or None,
        "audit command": summary.get("command"),
        "split sha256": (run.split or {}).get("sha256"),
        "checkpoint sha256": file_sha256(best) if best.is_file() else None,
        "weights sha256": (run.best or {}).get("weights_sha256"),
        "hardware": config.get("hardware"),
        "ranks": config.get("ranks"),
        "versions": config.get("versions"),
    }
    return {name: value for name, value in provenance.items() if value is not None}


# ------------------------------------------------------------------------------------------------------------
# All runs
# ------------------------------------------------------------------------------------------------------------


def write_index_page(path: Path, results: Path) -> None:
    """Write the page of all runs in `results`, newest first; runs that are not whole are shown as such."""
    runs = [read_run(folder) for folder in find_runs(results)]
    runs.sort(key=lambda run: run.written.timestamp() if run.written else 0.0, reverse=True)
    comparisons = [read_comparison(path) for path in sorted(results.glob("*/comparison.json"))]
    pages = {
        run.folder.name: [
            (name, relative)
            for name, relative in (("page", INDEX), ("report", "evaluation/report.html"), ("card", CARD))
            if (run.folder / relative).is_file()
        ]
        for run in runs
    }
    write_page(
        path,
        "index.html.j2",
        results=results.resolve().name,
        runs=runs,
        pages=pages,
        paths={run.folder.name: shlex.quote(str(run.folder)) for run in runs},
        comparisons=comparisons,
    )


def read_comparison(path: Path) -> dict[str, Any]:
    """Return the names, page and headlines of a comparison; "problem" says why there are none."""
    page = path.with_name("comparison.html")
    entry: dict[str, Any] = {"folder": path.parent.name, "a": None, "b": None, "differences": []}
    entry |= {"href": f"{path.parent.name}/{page.name if page.is_file() else path.name}", "problem": None}
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
        entry["a"], entry["b"] = Path(comparison["run_a"]).name, Path(comparison["run_b"]).name
        audits = [Path(comparison[f"run_{name}"]) / "evaluation" / "metrics_per_case.csv" for name in "ab"]
        hashes = [file_sha256(audit) if audit.is_file() else None for audit in audits]
        if None not in hashes and hashes != comparison["metrics_sha256"]:
            entry["problem"] = "of earlier audits, compare again"
        for cohort, regions in comparison["cohorts"].items():
            for region, modes in regions.items():
                difference = dict(modes["tta" if "tta" in modes else "plain"]["dice"]["difference"])
                if modes["n_patients"] < LEAST_PATIENTS:  # earlier versions wrote an interval
                    difference["ci95"] = None
                entry["differences"].append(
                    {
                        "place": f"{cohort} {region}",
                        "mean": f"{difference['mean']:+.4f}",
                        "spread": format_spread(difference, "{:+.4f}", "95 % CI "),
                        "p": f"{difference['p_sign_flip']:.3g}",
                        "cases": modes["n_cases"],
                    }
                )
    except Exception as error:  # as for runs: a damaged file is shown, not raised
        entry |= {"problem": f"comparison.json: not readable ({type(error).__name__})", "differences": []}
    return entry
