"""Cases named on the command line, be they cohort folders, case folders or files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cohort.cases import Case
from cohort.layouts import CaseSource, cases_of_files, find_lacking, missing_modality, scan_cases
from runtime.errors import InputError


def find_readable(
    names: Sequence[str], source: CaseSource, modalities: Sequence[str], partial: bool = False
) -> tuple[list[Case], list[tuple[str, InputError]]]:
    """Return the cases below the folders and in the files named, and (case or folder, error) of the others.

    Others are cases that cannot be told from their files or lack a modality, with `partial` all of them.
    `source` says how folders are
    read. Raises InputError where no case is left, and where an id occurs twice.
    """
    cases: list[Case] = []
    errors: list[tuple[str, InputError]] = []
    for name in names:
        if Path(name).is_file():
            cases += cases_of_files([Path(name)], modalities)
            continue
        problems: list[InputError] = []
        for case in scan_cases(dataclasses.replace(source, data_dir=name), problems):
            if missing := find_lacking(case, modalities, partial):
                errors.append((case.case_id, missing_modality(case, missing[0])))
            else:
                cases.append(case)
        errors += [(error.place, error) for error in problems]
    if errors and not cases:
        raise errors[0][1]
    ids = [case.case_id for case in cases]
    if twice := [case_id for case_id in ids if ids.count(case_id) > 1]:
        raise InputError(
            "--input",
            f"case {twice[0]} occurs twice, and one would overwrite the other",
            "segment them apart",
        )
    return cases, errors
