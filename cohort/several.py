"""Several cohorts as one: their names, ids that no two of them share, the split, and Dice per cohort."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cohort.cases import Case
from cohort.patients import is_sheet_about, map_patients, names_one_patient, patient_named
from cohort.split import SPLIT_PARTS, home_of_patients, split_cases, split_sha256
from runtime.errors import InputError
from runtime.log import log

MAYBE_TCGA = r"BraTS(?:1\d_TCIA|20_|2021_|20\d\d_GLI|-GLI-)"  # ids under which BraTS has patients of TCGA
DataDir = str | Path | Sequence[str] | None  # one folder, or several
COHORT_DICE = "validation_{region}_{cohort}"  # columns of log.csv


class OfCohort(Protocol):
    """A case, prepared or not."""

    cohort: str


def list_folders(data_dir: DataDir) -> tuple[str, ...]:
    """Return the folders of a setting that holds one, several or none."""
    if data_dir is None:
        return ()
    return (str(data_dir),) if isinstance(data_dir, str | Path) else tuple(map(str, data_dir))


def show_folders(data_dir: DataDir) -> str:
    """Return the folders of a setting as they were typed."""
    return " ".join(list_folders(data_dir))


def list_cohorts(cases: Sequence[OfCohort]) -> list[str]:
    """Return the names of the cohorts that cases are of, in their order."""
    return list(dict.fromkeys(case.cohort for case in cases))


def check_folders(folders: Sequence[str]) -> None:
    """Raise InputError where a folder is another one or lies in it: its cases would be there twice."""
    paths = [Path(folder).resolve() for folder in folders]
    for index, path in enumerate(paths):
        for other in (*paths[:index], *paths[index + 1 :]):
            if path.is_relative_to(other):
                raise InputError(
                    f"--data-dir {show_folders(folders)}",
                    f"{path} is in {other}, so its cases would be there twice",
                    "name each cohort once, and no folder inside another",
                )


def name_cohorts(folders: Sequence[str]) -> list[str]:
    """Return the name of each cohort: that of its folder, with those above it where two are called alike."""
    paths = [Path(folder).resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["_".join(part.strip("/\\:") for part in path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{index}" for index, name in enumerate(names)]


def join_cohorts(
    names: Sequence[str], scanned: Sequence[tuple[list[Case], list[Path]]], given: Path | None
) -> list[Case]:
    """Return the cases of several folders, each given as (cases, mapping sheets), as those of cohorts.

    `given` is the sheet of --mapping; InputError where it names a case of none of them.
    """
    if given and not any(is_sheet_about(given, [case.case_id for case in cases]) for cases, _ in scanned):
        raise InputError(f"--mapping {given}", "names none of the cases", "give their sheet")
    cases = [
        dataclasses.replace(case, cohort=name)
        for name, (own, sheets) in zip(names, scanned, strict=True)
        for case in map_patients(own, [*sheets, *([given] if given else [])])
    ]
    return make_ids_unique(cases)


def make_ids_unique(cases: Sequence[Case]) -> list[Case]:
    """Return the cases of several cohorts, sorted by ids of which no two are the same.

    A case id that is in two cohorts gets the cohort's name in front. So does an id of a patient, unless it is
    of a kind that names one patient wherever it is: sub-001 is somebody at every site, TCGA_HT_7473 is not.
    """
    held = {(case.cohort, name) for case in cases for name in (case.case_id, case.patient_id, *case.aliases)}
    holders = Counter(name for _, name in held)
    ids = Counter(case.case_id for case in cases)

    def own(case: Case, name: str) -> str:
        is_shared = holders[name] > 1 and not names_one_patient(name)
        return f"{case.cohort}_{name}" if is_shared else name

    unique = [
        dataclasses.replace(
            case,
            case_id=f"{case.cohort}_{case.case_id}" if ids[case.case_id] > 1 else case.case_id,
            patient_id=own(case, case.patient_id),
            aliases=tuple(own(case, name) for name in case.aliases),
        )
        for case in cases
    ]
    if shared := [case_id for case_id, count in ids.items() if count > 1]:
        log.info(
            "%d case ids are in more than one cohort and get its name in front, first %s",
            len(shared),
            shared[0],
        )
    if twice := [case_id for case_id, count in Counter(case.case_id for case in unique).items() if count > 1]:
        raise InputError(f"case {twice[0]}", "is there twice, in two cohorts", "rename one of their folders")
    return sorted(unique, key=lambda case: case.case_id)


def warn_of_unmapped(cases: Sequence[Case]) -> None:
    """Warn where one cohort has TCGA ids and another has BraTS ids that no mapping sheet explains.

    Many BraTS scans are of TCGA patients, skull-stripped and resampled: their content is no longer alike.
    """

    def is_of(case: Case, pattern: str) -> bool:
        return re.match(pattern, patient_named(case.case_id) or "", re.IGNORECASE) is not None

    for name in list_cohorts(cases):
        own = [case for case in cases if case.cohort == name]
        unmapped = [case for case in own if is_of(case, MAYBE_TCGA) and not case.aliases]
        others = [case.cohort for case in cases if case.cohort != name and is_of(case, "TCGA_")]
        if unmapped and others:
            log.warning(
                "%d cases of %s, first %s, may be TCGA patients, whom %s has too: content does not find a "
                "scan that was skull-stripped and resampled; give the data set's name mapping by --mapping",
                len(unmapped),
                name,
                unmapped[0].case_id,
                " and ".join(dict.fromkeys(others)),
            )


def rename_patients(cases: Sequence[Case], joined: Mapping[str, str]) -> list[Case]:
    """Return the cases with the patients of {case id: patient}; the id a case had becomes an alias."""
    renamed = []
    for case in cases:
        patient = joined.get(case.case_id, case.patient_id)
        if patient != case.patient_id:
            aliases = sorted({*case.aliases, case.patient_id} - {patient})
            case = dataclasses.replace(case, patient_id=patient, aliases=tuple(aliases))
        renamed.append(case)
    return renamed


def split_cohorts(cases: Sequence[Case], seed: int) -> dict[str, Any]:
    """Return the split of `split_cases`, drawn in each cohort by itself so that every part has some of each.

    A patient who is in several cohorts goes with the first of them. Where a cohort has fewer than three
    patients, all are split together.
    """
    home = home_of_patients(cases, list_cohorts(cases))
    counts = Counter(home.values())
    if len(list_cohorts(cases)) < 2:
        return split_cases(cases, seed)
    if few := [name for name in list_cohorts(cases) if counts[name] < 3]:
        log.warning(
            "%s has fewer than 3 patients of its own: the cohorts are split together, and a part may have "
            "none of it",
            " and ".join(few),
        )
        return split_cases(cases, seed)
    splits = [split_cases([case for case in cases if home[case.patient_id] == name], seed) for name in counts]
    parts = {part: sorted(case_id for split in splits for case_id in split[part]) for part in SPLIT_PARTS}
    return {**splits[0], **parts, "sha256": split_sha256(parts)}


def pair_layouts(folders: Sequence[str], layout: str | Sequence[str]) -> list[str]:
    """Return the layout of each folder; InputError where there is neither one for all nor one for each."""
    layouts = [layout] if isinstance(layout, str) else list(layout)
    if len(layouts) not in (1, len(folders)):
        raise InputError(
            f"--layout {' '.join(layouts)}",
            f"{len(layouts)} layouts for {len(folders)} folder(s) in --data-dir",
            "give one for all, or one per folder in the same order",
        )
    return layouts * len(folders) if len(layouts) == 1 else layouts


def pair_weights(folders: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Return {cohort: weight} of --cohort-weights, empty without it; InputError where they do not pair up."""
    if not weights:
        return {}
    if len(weights) != len(folders):
        raise InputError(
            f"--cohort-weights {' '.join(f'{weight:g}' for weight in weights)}",
            f"{len(weights)} weights for {len(folders)} folders in --data-dir",
            "give one weight per folder, in the same order",
        )
    return dict(zip(name_cohorts(folders), weights, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Dice per cohort
# ------------------------------------------------------------------------------------------------------------


def score_cohorts(cases: Sequence[OfCohort], dice: np.ndarray, regions: Sequence[str]) -> dict[str, float]:
    """Return {column of log.csv: mean Dice over a cohort's cases}, empty for one cohort.

    `dice` (cases, R) is of the validation cases.
    """
    names = list_cohorts(cases)
    if len(names) < 2:
        return {}
    own = {name: dice[[case.cohort == name for case in cases]].mean(0) for name in sorted(names)}
    return {
        COHORT_DICE.format(region=region, cohort=name): float(value)
        for name, values in own.items()
        for region, value in zip(regions, values, strict=True)
    }


def show_scores(row: Mapping[str, float]) -> str:
    """Return the figures of `score_cohorts` in a row of the log as text, empty where there are none."""
    prefix = COHORT_DICE.partition("{")[0]
    own = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
    return " (" + ", ".join(f"{name} {value:.4f}" for name, value in own.items()) + ")" if own else ""
