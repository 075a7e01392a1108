"""What the files of a run's folder say, however many of them are there and whole.

For pages that list runs: a file that is missing, cut short or of another form is a line in `problems`, never
an error.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from audit.kinds import KIND_WORDS
from audit.sources import list_missing
from audit.statistics import LEAST_PATIENTS, format_spread
from cohort.folds import is_run_of_folds, list_folders
from cohort.split import SPLIT_PARTS, read_split
from runtime.checkpoints import read_facts
from runtime.errors import InputError
from runtime.files import file_sha256
from runtime.tables import read_table

Content = TypeVar("Content")
# what config.json holds beside settings: what is shown elsewhere, and ids of cases, which no page names
NO_SETTINGS = (
    "split_patients", "command", "hardware", "versions", "held_out", "skipped", "declared_different",
    "joined_patients", "resumed_with",
)  # fmt: skip
TESTED = ("internal", "external", "external_unseen", "predictions")  # the order in which cohorts are shown


class Headline(NamedTuple):
    """Dice per case, mean over the cases of one test cohort and region."""

    cohort: str
    region: str
    is_tta: bool
    dice: dict[str, Any]  # as of `statistics.summarise`
    n_cases: int
    n_patients: int

    @property
    def mean(self) -> str:
        """The mean with three decimals."""
        return f"{self.dice['mean']:.3f}"

    @property
    def median(self) -> str:
        """The median with three decimals."""
        return f"{self.dice['median']:.3f}"

    @property
    def spread(self) -> str:
        """The interval, or the range and n, in words."""
        return format_spread(self.dice, "{:.3f}", "95 % CI ")


@dataclass
class RunFacts:
    """What a run's folder holds; None for what is not there or not readable."""

    folder: Path
    config: dict[str, Any] | None = None
    split: dict[str, Any] | None = None
    epochs: pd.DataFrame | None = None  # log.csv
    best: dict[str, Any] | None = None  # best.pt without its weights
    summary: dict[str, Any] | None = None  # of the audit, where it is of this best.pt
    headlines: list[Headline] = field(default_factory=list)
    sources: list[Headline] = field(default_factory=list)  # of each cohort trained on, of several
    folds: list["RunFacts"] = field(default_factory=list)  # of a run of folds
    progress: dict[str, str] = field(default_factory=dict)  # how far training came, in figures
    counts: list[dict[str, Any]] = field(default_factory=list)  # of the split, by part
    marks: list[str] = field(default_factory=list)  # what qualifies the numbers
    problems: list[str] = field(default_factory=list)
    is_outdated: bool = False  # whether the audit is of an earlier best.pt

    @property
    def is_trained(self) -> bool:
        """Whether training has come to its end, which is the choice of post-processing; of all folds."""
        if self.folds:
            return all(fold.is_trained for fold in self.folds)
        return self.best is not None and "postprocessing" in self.best

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in config.json; empty where it is not there."""
        return {name: value for name, value in (self.config or {}).items() if name not in NO_SETTINGS}

    @property
    def commands(self) -> list[str]:
        """The command that started training and those that resumed it; empty where no file says."""
        config = self.config or {}
        return [config["command"], *config.get("resumed_with", ())] if config.get("command") else []

    @property
    def data_kind(self) -> str:
        """What was trained on: "phantom", "real", "mixed" or "unknown"."""
        for source in (self.config, self.best, self.summary, *(fold.config for fold in self.folds)):
            if source and source.get("data_kind") in KIND_WORDS:
                return source["data_kind"]
        return "unknown"

    @property
    def left_out(self) -> dict[str, int]:
        """How many cases were held out and skipped; of a run of folds each fold says it."""
        known = next((fold.config for fold in self.folds if fold.config), None) or self.config or {}
        return {name: len(known.get(name) or ()) for name in ("held_out", "skipped")}

    @property
    def written(self) -> datetime | None:
        """When best.pt was written, or the folder's first file where there is none."""
        newest = [fold.written for fold in self.folds if fold.best is not None]
        if newest:
            return max(newest)
        for name in ("best.pt", "evaluation/summary.json", "config.json", "."):
            try:
                return datetime.fromtimestamp((self.folder / name).stat().st_mtime)
            except OSError:
                continue
        return None

    @property
    def state(self) -> str:
        """How far the run has come, in words."""
        if self.problems:
            return "broken"
        if self.is_outdated:
            return "trained further since its audit"
        if self.headlines:
            is_other_tools = self.best is None and not self.folds
            return "audited" if is_other_tools or self.is_trained else "audited, training not finished"
        if self.is_trained:
            return "trained, not audited"
        return "unfinished"


def find_runs(results: Path) -> Iterator[Path]:
    """Yield the folders in `results` that are runs or scores of another tool's masks."""
    marks = ("config.json", "best.pt", "last.pt", "evaluation/summary.json")
    for folder in sorted(results.iterdir()):
        try:
            if folder.is_dir() and any((folder / mark).exists() for mark in marks):
                yield folder
        except OSError:
            yield folder  # a folder that may not be looked into is shown as broken


def read_run(folder: Path) -> RunFacts:
    """Return what a run's folder says."""
    run = RunFacts(folder)
    run.config = _read(run, "config.json", _read_object)
    run.folds = _note(run, "config.json", lambda: [read_run(fold) for fold in list_folds(folder)]) or []
    run.split = _read(run, "split.json", read_split)
    run.epochs = _read(run, "log.csv", _read_epochs)
    run.best = _read(run, "best.pt", read_facts)
    run.summary = _read(run, "evaluation/summary.json", _read_object)
    if run.summary is not None:
        run.headlines = _note(run, "evaluation/summary.json", lambda: find_headlines(run.summary)) or []
        run.sources = _note(run, "evaluation/summary.json", lambda: find_sources(run.summary)) or []
        if _note(run, "evaluation/summary.json", lambda: is_of_other_weights(folder, run.summary)):
            run.summary, run.headlines, run.sources, run.is_outdated = None, [], [], True
    if run.best is None and not run.headlines and not run.problems:
        run.problems += [] if (folder / "config.json").exists() else ["config.json: not there"]
    run.marks = _note(run, "evaluation/summary.json", lambda: list_marks(run)) or []
    run.counts = _note(run, "config.json", lambda: count_split(run)) or []
    run.progress = _note(run, "best.pt", lambda: describe_progress(run)) or {}
    return run


def _read(run: RunFacts, name: str, read: Callable[[Path], Content]) -> Content | None:
    """Return what `read` makes of a file; None where there is none, and where it fails, which is noted."""
    path = run.folder / name
    return _note(run, name, lambda: read(path) if path.exists() else None)


def _note(run: RunFacts, name: str, action: Callable[[], Content]) -> Content | None:
    """Return what `action` does, or None where it fails, which is noted as a problem of the file `name`."""
    try:
        return action()
    except Exception as error:  # whatever a damaged file makes of it: a list of runs shows it as broken
        words = error.problem if isinstance(error, InputError) else f"not readable ({error!r:.120})"
        run.problems.append(f"{name}: {words}")
        return None


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError("no JSON object")
    return content


def _read_epochs(path: Path) -> pd.DataFrame:
    epochs = read_table(path)
    epochs[["epoch", "minutes", "train_loss"]].astype(float)  # KeyError or ValueError where it is no such log
    return epochs


def find_headlines(summary: Mapping[str, Any]) -> list[Headline]:
    """Return the headline of each test cohort and region of an audit's summary, in the order shown."""
    cohorts = summary["cohorts"]
    return make_headlines({name: cohorts[name] for name in TESTED if name in cohorts})


def find_sources(summary: Mapping[str, Any]) -> list[Headline]:
    """Return the headline of each cohort trained on among the internal cases; empty where it is one."""
    return make_headlines(summary.get("by_source", {}).get("internal", {}))


def make_headlines(cohorts: Mapping[str, Mapping[str, Any]]) -> list[Headline]:
    """Return the headlines of {cohort: {region: modes}}; a cohort without a defined Dice has none."""
    headlines = []
    for cohort, regions in cohorts.items():
        for region, modes in regions.items():
            scores = modes["tta" if "tta" in modes else "plain"]
            dice, patients = dict(scores["dice"]), int(scores["n_patients"])
            if dice["mean"] is None:
                continue
            if not math.isfinite(dice["mean"]):
                raise ValueError(f"Dice {dice['mean']}")
            if patients < LEAST_PATIENTS:  # earlier versions wrote an interval
                dice["ci95"] = None
            headline = Headline(cohort, region, "tta" in modes, dice, int(scores["n_cases"]), patients)
            _ = headline.mean, headline.median, headline.spread  # an error here, not in a page
            headlines.append(headline)
    return headlines


def list_folds(run: Path) -> list[Path]:
    """Return the folder of each fold of a run of folds, whether it is there or not; empty for other runs."""
    try:
        return list_folders(run) if is_run_of_folds(run) else []
    except TypeError:  # a count that is no number
        return []


def is_of_other_weights(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Return whether an audit is of another best.pt than the folder's, as after --resume.

    Of a run of folds each fold's counts. Hashes are compared only where a checkpoint is younger than the
    audit; one that was written again with the same weights, threshold and post-processing is no other.
    """
    audited = [(folder / "best.pt", summary)]
    for fold in summary.get("folds") or ():
        audited.append((folder / f"fold_{fold['fold']}" / "best.pt", fold))
    written = (folder / "evaluation" / "summary.json").stat().st_mtime
    return any(
        file_sha256(best) != known["checkpoint_sha256"] and not is_written_again(best, known)
        for best, known in audited
        if known.get("checkpoint_sha256") and best.exists() and best.stat().st_mtime > written
    )


def is_written_again(path: Path, known: Mapping[str, Any]) -> bool:
    """Return whether a best.pt has the weights and choices that an audit knows, in another file."""
    if "weights_sha256" not in known:  # an audit of an earlier version
        return False
    best = read_facts(path)
    thresholds = dict(zip(best["config"]["regions"], best["thresholds"], strict=True))
    return all(
        known[name] == now
        for name, now in (
            ("weights_sha256", best["weights_sha256"]),
            ("threshold", thresholds),
            ("postprocessing", best.get("postprocessing")),
        )
    )


def count_split(run: RunFacts) -> list[dict[str, Any]]:
    """Return part, cases and patients (None where no file says) of each part of a run's split."""
    if run.split is None:
        return []
    patients = (run.config or {}).get("split_patients") or {}
    return [
        {"part": part, "cases": len(run.split[part]), "patients": patients.get(part)} for part in SPLIT_PARTS
    ]


def list_marks(run: RunFacts) -> list[str]:
    """Return what qualifies the numbers of a run's audit, in sentences."""
    marks = []
    if run.is_outdated:
        marks.append("The audit is of an earlier best.pt, so its numbers are not shown: audit the run again.")
    for cohort, count in ((run.summary or {}).get("seen_in_training") or {}).items():
        if count.get("seen"):
            marks.append(
                f"{cohort}: {count['seen']} of {count['cases']} cases were in training or validation: "
                "not a held-out result."
            )
    if run.summary and run.summary.get("predictions"):
        marks.append("Masks of another tool: what it was trained on is not known.")
    summary = run.summary or {}
    for cohort, kind in summary.get("kinds", {}).items():
        if cohort != "validation" and kind != summary.get("data_kind"):
            marks.append(f"{cohort}: {KIND_WORDS[kind]}.")
    marks += [f"{words}." for words in list_missing(summary)]
    for best in (run.best, *(fold.best for fold in run.folds[:1])):
        if begun := (best or {}).get("init"):
            marks.append(describe_init(begun))
    return marks


def describe_init(begun: Mapping[str, Any]) -> str:
    """Return what the weights of --init had learnt, from what a checkpoint says of them."""
    learnt = KIND_WORDS.get(begun.get("data_kind"), "data of an unknown kind")
    words = f"Training began with weights that had learnt {learnt}"
    if seen := begun.get("validation_seen"):
        words += f"; they had seen {seen} of the validation cases, on which the threshold is chosen"
    return f"{words}."


def describe_progress(run: RunFacts) -> dict[str, str]:
    """Return in figures how far training came: epochs, minutes, best validation Dice; what is known of it."""
    progress = {}
    if run.folds:
        progress["folds trained"] = f"{sum(fold.is_trained for fold in run.folds)} of {len(run.folds)}"
    if run.epochs is not None and len(run.epochs):
        last = run.epochs.iloc[-1]
        of = f" of {run.config['epochs']}" if run.config and "epochs" in run.config else ""
        progress["epochs"] = f"{last['epoch']:.0f}{of}"
        progress["time"] = describe_minutes(float(last["minutes"]))
    if run.best is not None and "validation_dice" in run.best:
        progress["validation Dice"] = f"{run.best['validation_dice']:.3f}"
        progress["epoch kept"] = str(run.best.get("epoch", "-"))
    return progress


def describe_minutes(minutes: float) -> str:
    """Return a duration in the unit that suits it."""
    return f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.1f} min"
