"""A run of folds: a folder that holds one run per fold, and what these have in common.

Its config.json holds the settings of all folds; its folds.json which cases each of them trains, validates and
tests on, drawn once. Its folders fold_0, fold_1 and so on are runs like any other.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cohort.cases import Case
from cohort.phantom import choose_data_dir
from cohort.split import split_folds, split_sha256
from runtime.checkpoints import has_last, load_checkpoint, load_last
from runtime.command import command_line, flag_of, from_plain, to_plain
from runtime.errors import InputError
from runtime.files import read_json, write_json
from runtime.log import log
from runtime.ranks import world_size

Settings = TypeVar("Settings")  # of training: with run, results_dir, resume, max_minutes and a TrainingSource
# What may differ between the folds of one run.
FREE = ("run", "results_dir", "resume", "config", "fold", "rate_since")
FREE += ("workers", "device", "cache_dir", "compile", "checkpointing", "probe")


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------


def is_run_of_folds(run: Path) -> bool:
    """Return whether a folder holds a run per fold."""
    try:
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("folds")) and settings.get("fold") is None


def list_folders(run: Path) -> list[Path]:
    """Return the folder of each fold of a run of folds, whether it is there or not."""
    return [run / f"fold_{fold}" for fold in range(json.loads((run / "config.json").read_text())["folds"])]


def is_finished(folder: Path) -> bool:
    """Return whether training of a run has come to its end, which is the choice of post-processing."""
    path = folder / "best.pt"
    return path.exists() and "postprocessing" in load_checkpoint(path)


def list_finished(run: Path) -> list[Path]:
    """Return the folders of all folds; InputError where one is not finished."""
    folders = list_folders(run)
    if missing := [folder.name for folder in folders if not is_finished(folder)]:
        raise InputError(
            run,
            f"{len(missing)} of its {len(folders)} folds are not finished, first {missing[0]}",
            f"go on with train_drunet_v2.py --resume {run}",
        )
    return folders


def list_checkpoints(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return checkpoint files, and of a run folder its best.pt, of a run of folds that of each fold."""
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if is_run_of_folds(path):
            files += [folder / "best.pt" for folder in list_finished(path)]
        else:
            files.append(path / "best.pt" if path.is_dir() else path)
    return files


def name_run(folder: Path) -> str:
    """Return what a run is called in titles: its folder's name, of a fold with that of the run."""
    return f"{folder.parent.name}/{folder.name}" if is_run_of_folds(folder.parent) else folder.name


# ------------------------------------------------------------------------------------------------------------
# Which cases
# ------------------------------------------------------------------------------------------------------------


def draw_fold(run: Path, cases: Sequence[Case], folds: int, fold: int, seed: int) -> dict[str, Any]:
    """Return the split of one fold; the first fold that asks draws those of all, into folds.json."""
    path = run / "folds.json"
    if not path.exists():
        write_json(path, {"folds": split_folds(cases, folds, seed)})
    split = read_json(path, "--folds", "a run of its own")["folds"][fold]
    if split["sha256"] != split_sha256(split):
        raise InputError(path, "the case ids do not match their SHA-256", "the file was altered")
    return split


def check_splits(run: Path, splits: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where the folds were not trained with the splits that were drawn for them."""
    drawn = read_json(run / "folds.json", "--run", "a run of folds")["folds"]
    for fold, (split, own) in enumerate(zip(splits, drawn, strict=True)):
        if split["sha256"] != own["sha256"]:
            raise InputError(
                run / f"fold_{fold}", "has another split than folds.json gives it", "train that fold again"
            )


# ------------------------------------------------------------------------------------------------------------
# What is to be trained
# ------------------------------------------------------------------------------------------------------------


def check_folds(config: Any) -> None:
    """Raise InputError where settings about folds contradict one another."""
    source = config.source
    if source.fold is not None and (source.folds is None or source.fold >= source.folds):
        last = "is not given" if source.folds is None else f"are numbered 0 to {source.folds - 1}"
        raise InputError(f"--fold {source.fold}", f"--folds {last}", "name one of --folds")
    if source.folds and source.split:
        raise InputError("--split", "does not go with --folds, which draws splits", "leave one out")


def plan_runs(
    config: Settings, place: Callable[[Settings], Settings], share_batch: Callable[..., Settings]
) -> tuple[Path | None, list[Settings]]:
    """Return the folder of a run of folds and the settings of each fold that is not finished.

    Without folds, and for one fold resumed by its own folder, that is None and the settings given. `place`
    gives a new run its name, and `share_batch` adapts the batch to another number of ranks.
    """
    check_folds(config)
    if not config.source.folds or (config.resume and not is_run_of_folds(Path(config.resume))):
        return None, [config]
    if config.run and is_run_of_folds(Path(config.results_dir) / config.run):
        run = Path(config.results_dir) / config.run
        data_dir = choose_data_dir(config.source.data_dir)
        config = dataclasses.replace(config, source=dataclasses.replace(config.source, data_dir=data_dir))
        if not config.resume:
            refuse_other(run, config)
    else:
        config = place(config)
        run = Path(config.results_dir) / config.run
        whole = dataclasses.replace(config, source=dataclasses.replace(config.source, fold=None))
        made = {"command": command_line(), "ranks": world_size()}
        write_json(run / "config.json", to_plain(whole) | made)
    config = share_batch(config, read_json(run / "config.json", "--run", "a run")["ranks"], world_size())
    folders = list_folders(run)
    numbers = range(len(folders)) if config.source.fold is None else [config.source.fold]
    waiting = [number for number in numbers if not is_finished(folders[number])]
    log.info("%s: %d folds, to train now: %s", run, len(folders), ", ".join(map(str, waiting)) or "none")
    return run, [settings_of_fold(config, folders[number], number) for number in waiting]


def settings_of_fold(config: Settings, folder: Path, number: int) -> Settings:
    """Return the settings of one fold; one that was begun goes on, for what is left of --max-minutes."""
    source = dataclasses.replace(config.source, fold=number)
    place = {"results_dir": str(folder.parent), "run": folder.name, "source": source}
    if not has_last(folder):
        return dataclasses.replace(config, **place, resume=None)
    last, _ = load_last(folder)
    # the slabs of a step are the fold's own: it may have gone on with other ranks before
    own = {name: last["config"][name] for name in ("batch_size", "accumulate", "rate_since")}
    if config.max_minutes:
        own["max_minutes"] = max(config.max_minutes - last["minutes"], 0.01)
    return dataclasses.replace(config, **place, resume=str(folder), **own)


def refuse_other(run: Path, config: Any) -> None:
    """Raise InputError where a run of folds is not to be added to: all folds asked for, or other settings."""
    if config.source.fold is None:
        raise InputError(f"--run {run.name}", "this run exists", "choose another name or --resume it")
    before = to_plain(from_plain(type(config), read_json(run / "config.json", "--run", "a run")))
    for name, value in to_plain(config).items():
        if name not in FREE and value != before[name]:
            raise InputError(
                f"{flag_of(name)} {value}",
                f"the other folds of {run} are trained with {before[name]}",
                "leave the flag out or choose another --run",
            )


def log_next(run: Path) -> None:
    """Say what a run of folds lacks, or what can be done with it now."""
    if waiting := [folder.name for folder in list_folders(run) if not is_finished(folder)]:
        log.info("to train before the folds of %s can be audited: %s", run, ", ".join(waiting))
    else:
        log.info("all folds are finished; audit them: python final_evaluation_v2.py --run %s", run)


def leave_run(config: Settings) -> Settings:
    """Return a fold's settings as those of a new run: beside the old run, not in it."""
    if config.source.fold is None:
        return config
    return dataclasses.replace(config, results_dir=str(Path(config.results_dir).parent))
