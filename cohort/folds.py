"""A run of folds: a folder that holds one run per fold, and what these have in common.

Its config.json holds the settings of all folds; its folds.json which cases each of them trains, validates and
tests on, drawn once. Its folders fold_0, fold_1 and so on are runs like any other.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cohort.cases import Case
from cohort.phantom import choose_data_dir
from cohort.split import SPLIT_PARTS, read_split, split_folds, split_sha256
from runtime.checkpoints import has_last, load_checkpoint, load_last, read_facts
from runtime.claims import ClaimedError, claim_folder
from runtime.command import command_line, flag_of, from_plain, to_plain
from runtime.errors import InputError
from runtime.files import read_json, write_json
from runtime.log import log
from runtime.ranks import world_size

Settings = TypeVar("Settings")  # of training: with run, results_dir, resume, max_minutes and a TrainingSource
# What may differ between the folds of one run.
FREE = ("run", "results_dir", "resume", "config", "fold", "rate_since")
FREE += ("workers", "device", "cache_dir", "compile", "checkpointing", "probe")
# What best.pt, the checkpoint of an earlier epoch, may say otherwise: where the run was to end, and how many
# slabs each of its ranks had.
ENDS = ("epochs", "max_minutes", "early_stop", "batch_size", "accumulate", "deterministic")
LONGEST_WAIT_S = 60  # for another program that is starting the same run


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
    split = read_drawn(run, folds)[fold]
    if split["sha256"] != split_sha256(split):
        raise InputError(path, "the case ids do not match their SHA-256", "the file was altered")
    drawn = {case_id for part in SPLIT_PARTS for case_id in split[part]}
    if new := [case.case_id for case in cases if case.case_id not in drawn]:
        raise InputError(
            path,
            f"the folds were drawn without {len(new)} of the cases, first {new[0]}, which none would test",
            "take these out, or start another --run",
        )
    return split


def read_drawn(run: Path, folds: int) -> list[dict[str, Any]]:
    """Return the split of each fold, as folds.json has them; InputError where it does not have all."""
    drawn = read_json(run / "folds.json", "--folds", "a run of its own").get("folds")
    if not isinstance(drawn, list) or len(drawn) != folds:
        raise InputError(run / "folds.json", f"does not have the splits of {folds} folds", "restore it")
    return drawn


def check_splits(run: Path, splits: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise InputError where folds were not trained with the splits that were drawn for them."""
    drawn = read_drawn(run, len(list_folders(run)))
    for fold, split in splits.items():
        if split["sha256"] != drawn[fold]["sha256"]:
            raise InputError(
                run / f"fold_{fold}",
                "has another split than folds.json gives it",
                f"remove that folder, and train the fold by --resume {run}",
            )


def check_alike(run: Path, configs: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where folds were trained with different settings: they are no cross-validation."""
    for fold, config in enumerate(configs):
        for name, value in configs[0].items():
            if name not in (*FREE, *ENDS) and config.get(name, value) != value:
                raise InputError(
                    run / f"fold_{fold}",
                    f"was trained with {flag_of(name)} {config[name]}, fold_0 with {value}",
                    f"remove that folder, and train the fold by --resume {run}",
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
    config, is_there = find_or_place(config, place)
    run = Path(config.results_dir) / config.run
    if is_there:
        data_dir = choose_data_dir(config.source.data_dir)
        config = dataclasses.replace(config, source=dataclasses.replace(config.source, data_dir=data_dir))
        if not config.resume:
            refuse_other(run, config)
    else:
        whole = dataclasses.replace(config, source=dataclasses.replace(config.source, fold=None))
        made = {"command": command_line(), "ranks": world_size()}
        write_json(run / "config.json", to_plain(whole) | made)
    if config.resume:
        keep_ends(run, config)
    config = share_batch(config, read_json(run / "config.json", "--run", "a run")["ranks"], world_size())
    folders = list_folders(run)
    numbers = range(len(folders)) if config.source.fold is None else [config.source.fold]
    waiting = [number for number in numbers if not is_done(folders[number], config)]
    check_finished(run, set(range(len(folders))) - set(waiting))
    log.info("%s: %d folds, to train now: %s", run, len(folders), ", ".join(map(str, waiting)) or "none")
    return run, [settings_of_fold(config, folders[number], number) for number in waiting]


def find_or_place(config: Settings, place: Callable[[Settings], Settings]) -> tuple[Settings, bool]:
    """Return the settings with the name of their run, and whether it is there already."""
    run = Path(config.results_dir) / (config.run or "")
    if config.run and is_run_of_folds(run) and (config.resume or has_begun(run)):
        return config, True
    try:
        return place(config), False
    except ClaimedError:  # two folds were started at once
        if config.source.fold is None or not wait_for_start(run):
            raise
        return config, True


def has_begun(run: Path) -> bool:
    """Return whether the folds of a run have been drawn, or one of them has a checkpoint."""
    return (run / "folds.json").exists() or any(has_last(folder) for folder in list_folders(run))


def wait_for_start(run: Path) -> bool:
    """Wait until another program has written the settings of a run of folds; return whether it has."""
    until = time.monotonic() + LONGEST_WAIT_S
    while not is_run_of_folds(run) and time.monotonic() < until:
        time.sleep(0.2)
    return is_run_of_folds(run)


def is_done(folder: Path, config: Any) -> bool:
    """Return whether a fold has come to the end that `config` gives it."""
    if not is_finished(folder):
        return False
    if not has_last(folder):
        return True
    last = read_last(folder)
    return all(last["config"].get(name, value) == value for name, value in ends_of(config).items())


def read_last(folder: Path) -> dict[str, Any]:
    """Return what a fold's last checkpoint says, without reading its weights where it is whole."""
    try:
        return read_facts(folder / "last.pt")
    except InputError:
        return load_last(folder)[0]


def ends_of(config: Any) -> dict[str, Any]:
    """Return the settings by which --resume lets a run of folds go on longer."""
    return {name: getattr(config, name) for name in ("epochs", "early_stop")}


def keep_ends(run: Path, config: Any) -> None:
    """Write the ends of a resumed run into its config.json; InputError where a fold is beyond them."""
    for folder in list_folders(run):
        epoch = read_last(folder).get("epoch", 0) if has_last(folder) else 0
        if epoch > config.epochs:
            raise InputError(
                f"--epochs {config.epochs}", f"{folder} has been trained for {epoch}", "give as many at least"
            )
    before = read_json(run / "config.json", "--resume", "a run")
    if any(before.get(name) != value for name, value in ends_of(config).items()):
        write_json(run / "config.json", before | ends_of(config))


def check_finished(run: Path, numbers: Iterable[int]) -> None:
    """Raise InputError where finished folds are not of this run, by their splits."""
    if (run / "folds.json").exists():
        paths = {number: run / f"fold_{number}" / "split.json" for number in numbers}
        check_splits(run, {number: read_split(path) for number, path in paths.items() if path.exists()})


def begin_fold(config: Settings) -> Settings | None:
    """Return the settings of a fold as it stands now; None where another program has or had it meanwhile."""
    folder = Path(config.results_dir) / config.run
    try:
        claim_folder(folder, "wait until that one ends")
    except ClaimedError as error:
        log.info("%s is passed over: %s", folder, error.problem)
        return None
    if is_done(folder, config):
        log.info("%s is passed over: it has been finished meanwhile", folder)
        return None
    return config if config.resume else settings_of_fold(config, folder, config.source.fold)


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
