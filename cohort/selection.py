"""Which cases a run works on: those with a mask that are neither faulty nor of a patient kept for testing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cohort import cache, check, layouts, leakage
from cohort import split as splits
from cohort.cache import PreparedCase
from cohort.cases import Case, Modalities, with_reference
from cohort.conventions import check_regions
from cohort.fingerprints import fingerprint_modality
from cohort.labels import Regions
from cohort.layouts import CaseSource
from cohort.patients import describe_likely_visits
from cohort.phantom import is_phantom
from runtime.errors import InputError
from runtime.files import write_atomically, write_json
from runtime.log import log


@dataclass(frozen=True)
class TrainingSource(CaseSource):
    """Where the cases of a run are, what is read of them, and which are left out."""

    modalities: Modalities = ("flair",)
    """modalities, in channel order"""
    regions: Regions = ("WT",)
    """tumour regions, one sigmoid each"""
    split: str | None = None
    """split.json of another run to use instead of drawing a split"""
    hold_out_dir: str | None = None
    """cohort kept for testing: its patients are left out by id, mapping and content of the scans"""
    different: str | None = None
    """CSV file, two columns of case ids: pairs that look alike, and a person saw that they are two people"""
    skip_bad: bool = False
    """check every case first and leave out those with errors; see skipped.csv"""
    cache_dir: str = "cache"
    """folder of decoded volumes"""


@dataclass(frozen=True)
class Selection:
    """What a run works on, and the ids of the cases that were left out."""

    cases: list[Case]
    split: dict[str, Any]
    data_kind: str  # "phantom" or "real"
    held_out: list[str]
    skipped: list[str]
    different: leakage.Pairs = frozenset()  # pairs that a person declared different

    def count_patients(self) -> dict[str, int]:
        """Return how many patients each part of the split has."""
        patient_of = {case.case_id: case.patient_id for case in self.cases}
        return {
            part: len({patient_of.get(case_id, case_id) for case_id in self.split[part]})
            for part in splits.SPLIT_PARTS
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What the run's checkpoints say of its data."""
        return {
            "data_kind": self.data_kind,
            "held_out": self.held_out,
            "skipped": self.skipped,
            "split_sha256": self.split["sha256"],
            "declared_different": leakage.list_pairs(self.different),
        }


def select_cases(source: TrainingSource, seed: int, folder: Path, resumed: bool) -> Selection:
    """Return a run's cases and split, and write into its folder which were left out and why.

    A resumed run keeps what its folder says already.
    """
    different = leakage.read_different(source.different)
    all_cases, skipped = find_sound_cases(source, folder)
    masked = with_reference(all_cases, source.data_dir)
    check_regions(masked, source.regions)
    cases = hold_out(source, masked, folder, resumed)
    if likely_visits := describe_likely_visits(cases):
        log.warning("%s", likely_visits)
    kept = {case.case_id for case in cases}
    held_out = [case.case_id for case in masked if case.case_id not in kept]
    if (folder / "split.json").exists() and resumed:
        split = splits.read_split(folder / "split.json")
    else:
        check_enough_left(source, masked, cases)
        split = choose_split(source, cases, seed, {*held_out, *skipped})
        write_json(folder / "split.json", split)
    kind = "phantom" if is_phantom(masked[0]) else "real"
    return Selection(cases, split, kind, held_out, skipped, different)


def find_sound_cases(source: TrainingSource, folder: Path) -> tuple[list[Case], list[str]]:
    """Return the cases of the source and the ids (or files) of those that --skip-bad leaves out."""
    if not source.skip_bad:
        cases = layouts.find_cases(source, source.modalities)
        layouts.log_cases(cases)
        return cases, []
    cases, problems = check.check_cohort(source, source.modalities, every_file=False)
    errors = [problem for problem in problems if problem.severity == "error"]
    check.write_problems(folder / "skipped.csv", errors)
    faulty = check.has_error(problems)
    sound = [case for case in cases if case.case_id not in faulty]
    if not sound:
        raise InputError(source.data_dir, f"all {len(cases)} cases have errors", "look at them with --check")
    layouts.log_cases(sound)
    for problem in errors:
        log.info("left out: %s  %s: %s", problem.case or "-", problem.file, problem.problem)
    return sound, sorted({problem.case or problem.file for problem in errors})


def hold_out(source: TrainingSource, cases: Sequence[Case], folder: Path, resumed: bool) -> list[Case]:
    """Return the cases without the patients of the cohort in --hold-out-dir.

    Those left out stand in the run's held_out.csv; a resumed run takes them from there.
    """
    if not source.hold_out_dir:
        return list(cases)
    path = folder / "held_out.csv"
    if not (resumed and path.exists()):
        modality = fingerprint_modality(source.modalities)
        held_source = CaseSource(source.hold_out_dir, slice_channel=source.slice_channel)
        held = layouts.find_cases(held_source, (modality,))
        # the run's own cases as training wants them; the others, masked or not, for their fingerprints alone
        own = cache.prepare_cases(cases, source.modalities, source.regions, source.cache_dir)
        others = cache.prepare_cases(held, (modality,), (), source.cache_dir)
        left_out = leakage.find_held_out(
            [leakage.identify_case(case, source.modalities.index(modality)) for case in own],
            [leakage.identify_case(case) for case in others],
            leakage.read_different(source.different),
        )
        write_atomically(path, lambda target: left_out.to_csv(target, index=False))
    left_out = pd.read_csv(path, dtype={"case": str, "patient": str})
    counts = ", ".join(f"{count} by {name}" for name, count in left_out["evidence"].value_counts().items())
    log.info(
        "%d cases of %d patients are in %s and left out of the run%s; the list is in %s",
        left_out["case"].nunique(),
        left_out["patient"].nunique(),
        source.hold_out_dir,
        f" ({counts})" if counts else "",
        path,
    )
    for row in left_out.itertuples():
        log.info("  left out: %s, %s as %s", row.case, row.evidence, row.known_as)
    ids = set(left_out["case"])
    return [case for case in cases if case.case_id not in ids]


def check_enough_left(source: TrainingSource, masked: Sequence[Case], cases: Sequence[Case]) -> None:
    """Raise InputError where --hold-out-dir left fewer than three patients of those there were."""
    before, left = (len({case.patient_id for case in group}) for group in (masked, cases))
    if left < 3 <= before and source.hold_out_dir:
        raise InputError(
            f"--hold-out-dir {source.hold_out_dir}",
            f"{before - left} of the {before} patients in {source.data_dir} are in it and left out, see "
            f"held_out.csv; {left} remain, too few for train, validation and test",
            "hold out a cohort of other patients, or train on more",
        )


def choose_split(
    source: TrainingSource, cases: Sequence[Case], seed: int, left_out: set[str]
) -> dict[str, Any]:
    """Return the split of --split, without the cases that are left out of the run, or a new one."""
    if not source.split:
        return splits.split_cases(cases, seed)
    split = splits.read_split(source.split)
    return splits.without_cases(split, left_out) if left_out else split


def check_shown(cases: Sequence[PreparedCase], regions: Sequence[str], data_dir: str | None) -> None:
    """Raise InputError where no mask of a run holds a region: the network would learn to leave it empty."""
    for index, region in enumerate(regions):
        if not any(any(case.region_voxels[index]) for case in cases):
            raise InputError(
                f"--regions {' '.join(regions)}",
                f"no mask of the {len(cases)} cases in {data_dir} holds a voxel of {region}",
                "leave it out, or see whether --layout names the labels they have",
            )


def prepare_parts(selection: Selection, source: TrainingSource) -> dict[str, list[PreparedCase]]:
    """Return the prepared cases of train, validation and test, on every rank.

    Raises InputError where a patient is in two of them, by ids or by content.
    """
    parts = {
        name: splits.cases_of_split(selection.cases, selection.split, name, source.data_dir)
        for name in ("train", "validation")
    }
    test_ids = set(selection.split["test"])  # of which some may be gone since
    parts["test"] = [case for case in selection.cases if case.case_id in test_ids]
    everyone = [case for members in parts.values() for case in members]
    all_prepared = cache.prepare_for_all_ranks(everyone, source.modalities, source.regions, source.cache_dir)
    check_shown(all_prepared, source.regions, source.data_dir)
    prepared = iter(all_prepared)
    by_part = {name: list(itertools.islice(prepared, len(members))) for name, members in parts.items()}
    channel = source.modalities.index(fingerprint_modality(source.modalities))
    identities = {
        name: [leakage.identify_case(case, channel) for case in own] for name, own in by_part.items()
    }
    leakage.check_parts(identities, selection.different)
    return by_part
