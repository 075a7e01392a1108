"""The cases that an audit of a run tests on, and those of its training that they are held against.

`config` is the EvaluationConfig of final_evaluation_v2, `model` a TrainedModel of inference_v2.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cohort.cache import PreparedCase, prepare_cases
from cohort.cases import Case, with_reference
from cohort.layouts import find_cases, find_cases_of_run, log_cases
from cohort.leakage import Pairs, unpack_identities
from cohort.several import list_folders, rename_patients, show_folders
from cohort.split import cases_of_split, read_split
from runtime.errors import InputError
from runtime.log import log


def read_split_of(run: Path, model: Any) -> dict[str, Any]:
    """Return the split of a run; InputError where it is not the one its checkpoint was trained with."""
    split = read_split(run / "split.json")
    if split["sha256"] != model.checkpoint["split_sha256"]:
        raise InputError(
            run / "split.json", "not the split the checkpoint was trained with", "restore the run's own"
        )
    return split


def choose_cohorts(
    config: Any,
    run: Path,
    model: Any,
    split: dict[str, Any],
    with_external: bool = True,
) -> dict[str, list[Case]]:
    """Return the cases of validation, internal, and external where there is one.

    With them come, as "seen", the cases of train that are still there, and as "train" the same where the
    checkpoint does not identify them.
    """
    settings = model.checkpoint["config"]
    data_dir = config.data_dir or settings["data_dir"]
    place = show_folders(data_dir)
    cases = with_reference(find_cases_of_run(settings, data_dir), place)
    cases = rename_patients(cases, model.checkpoint.get("joined_patients", {}))
    cohorts: dict[str, list[Case]] = {
        "validation": cases_of_split(cases, split, "validation", place),
        "internal": cases_of_split(cases, split, "test", place),
    }
    external_dir = config.external.data_dir
    demo_external = Path(list_folders(data_dir)[0]).with_name("phantom_external")
    if external_dir is None and model.checkpoint["data_kind"] == "phantom" and demo_external.is_dir():
        external_dir = str(demo_external)
    if external_dir is not None and with_external:
        source = dataclasses.replace(config.external, data_dir=external_dir)
        external = find_cases(source, model.modalities, model.is_partial)
        log_cases(external, "external: ")
        cohorts["external"] = with_reference(external, external_dir)
    counts = ", ".join(f"{len(members)} {cohort} cases" for cohort, members in cohorts.items())
    log.info("auditing %s: %s", run, counts)
    training = [case for case in cases if case.case_id in set(split["train"])]
    if unpack_identities(model.checkpoint) is None:
        cohorts["train"] = training
    return cohorts | {"seen": training}


def fetch_seen(
    at_hand: Sequence[Case], settings: tuple[Sequence[str], Sequence[str], str], wanted: set[str]
) -> list[PreparedCase]:
    """Return, prepared, the training and validation cases of these ids; none where they are not readable."""
    try:
        return prepare_cases([case for case in at_hand if case.case_id in wanted], *settings)
    except InputError as error:
        log.warning("cases of training that look like tested ones cannot be compared: %s", error)
        return []


def recorded_pairs(checkpoint: dict[str, Any]) -> Pairs:
    """Return the pairs that were declared different in training."""
    return frozenset(map(frozenset, checkpoint.get("declared_different", ())))
