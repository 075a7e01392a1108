"""Test cases that training or validation has seen: found, counted, refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from cohort.cache import PreparedCase
from cohort.leakage import (
    Identity,
    Pairs,
    find_candidates,
    find_seen,
    identify_case,
    identity_of_ids,
    log_notes,
    select_proven,
    unpack_identities,
)
from runtime.errors import InputError
from runtime.log import log
from runtime.tables import write_table


def identify_seen(
    checkpoint: Mapping[str, Any], cases: Sequence[PreparedCase], channel: int = 0
) -> list[Identity]:
    """Return the identity of every case a run has trained or validated on.

    Checkpoints hold them, but for old ones. For those `cases` are the training and validation cases that are
    still there; the others are known by their ids alone.
    """
    known = unpack_identities(checkpoint)
    if known is not None:
        return known
    log.info("the checkpoint holds no fingerprints; they are taken from the cases of its training")
    known = [identify_case(case, channel) for case in cases]
    names = {one.case_id for one in known}
    gone = [entry for entry in checkpoint["seen"] if entry[0] not in names]
    if gone:
        log.warning(
            "%d training case(s), first %s, are not there and known by id alone", len(gone), gone[0][0]
        )
    return known + [identity_of_ids(case_id, patient_id) for case_id, patient_id, *_ in gone]


def attach_volumes(
    known: Sequence[Identity],
    tested: Sequence[Identity],
    fetch: Callable[[set[str]], Sequence[PreparedCase]],
    channel: int,
) -> list[Identity]:
    """Return the known cases, those a tested one is like with their volumes where these are still there.

    `fetch` prepares the cases of these ids that are at hand. A volume that is not the one of training, by the
    hash of its image, verifies nothing and is left out.
    """
    alike = {candidate.index for row in find_candidates(tested, known) for candidate in row}
    wanted = {known[index].case_id for index in alike if known[index].read_volume is None}
    prepared = {case.case_id: identify_case(case, channel) for case in fetch(wanted)} if wanted else {}
    attached = []
    for one in known:
        other = prepared.get(one.case_id)
        is_same = other is not None and other.image_sha256 == one.image_sha256
        attached.append(replace(one, read_volume=other.read_volume) if is_same else one)
    return attached


def list_leakage(
    cohorts: Mapping[str, Sequence[Identity]], known: Sequence[Identity], different: Pairs = frozenset()
) -> pd.DataFrame:
    """Return the rows of `find_seen` for the internal and the external cohort."""
    tables = [
        find_seen(cohort, cases, known, one_cohort=cohort == "internal", different=different)
        for cohort, cases in cohorts.items()
    ]
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def count_seen(cohorts: Mapping[str, Sequence[Identity]], leakage: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return {cohort: {"cases", "seen", "unseen"}} of the internal and the external cohort."""
    counts = {}
    for cohort, cases in cohorts.items():
        seen = int((leakage["cohort"] == cohort).sum())
        counts[cohort] = {"cases": len(cases), "seen": seen, "unseen": len(cases) - seen}
    return counts


def count_grades(leakage: pd.DataFrame) -> dict[str, int]:
    """Return how many tested cases were found with each grade of evidence, notes included."""
    return {str(grade): int(count) for grade, count in leakage["grade"].value_counts().items()}


def refuse_seen(seen: dict[str, dict[str, int]], leakage: pd.DataFrame, allow_seen: bool) -> None:
    """Raise InputError where an internal case was seen or no external one is unseen, unless allowed.

    An external cohort of which some were seen goes on: it is reported as a whole, marked, and without them.
    """
    for cohort, count in () if allow_seen else seen.items():
        if not count["seen"] or (cohort == "external" and count["unseen"]):
            continue
        first = leakage[leakage["cohort"] == cohort].iloc[0]
        example = f"{first['case']} is {first['training_case']} by {first['evidence']}"
        if cohort == "external":
            raise InputError(
                "--external-dir",
                f"each of its {count['cases']} cases was seen in training or validation ({example}), so they "
                "are not external",
                "give another cohort, train with --hold-out-dir, or pass --allow-seen to mark the output",
            )
        raise InputError(
            f"{cohort} test cases",
            f"{count['seen']} of them were seen in training or validation ({example})",
            "take them out, or pass --allow-seen to audit them and mark the output; images that you looked "
            "at and that are of two people belong in --different",
        )


def search_leakage(
    path: Path,
    cohorts: Mapping[str, Sequence[Identity]],
    known: Sequence[Identity],
    allow_seen: bool,
    different: Pairs = frozenset(),
) -> tuple[pd.DataFrame, dict[str, dict[str, int]]]:
    """Return the rows of leakage.csv and the counts of `count_seen`; write and log them, then refuse.

    Rows that are no proof (`leakage.NOTES`) are written and warned of; they neither count nor refuse.
    """
    leakage = list_leakage(cohorts, known, different)
    write_table(path, leakage)
    proven = select_proven(leakage)
    seen = count_seen(cohorts, proven)
    for cohort, count in seen.items():
        log.info(
            "%s: %d cases, %d of them seen in training or validation, %d unseen", cohort, *count.values()
        )
    log_notes(leakage, "of training or validation")
    refuse_seen(seen, proven, allow_seen)
    return leakage, seen
