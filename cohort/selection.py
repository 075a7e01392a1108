"""Which cases a run works on: those with a mask that are neither faulty nor of a patient kept for testing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cohort import cache, check, folds, layouts, leakage, phantom, several
from cohort import split as splits
from cohort.cache import PreparedCase
from cohort.cases import Case, Modalities, with_reference
from cohort.conventions import check_regions
from cohort.fingerprints import fingerprint_modality
from cohort.labels import Regions
from cohort.layouts import CaseSource
from cohort.patients import describe_likely_visits, group_ids
from cohort.phantom import is_phantom, name_kind
from runtime import ranks
from runtime.command import CountOrZero, FoldCount, Positive
from runtime.errors import InputError
from runtime.files import write_json
from runtime.log import log
from runtime.tables import read_columns, write_table


@dataclass(frozen=True)
class TrainingSource(CaseSource):
    """Where the cases of a run are, what is read of them, and which are left out."""

    modalities: Modalities = ("flair",)
    """modalities, in channel order"""
    regions: Regions = ("WT",)
    """tumour regions, one sigmoid each"""
    split: str | None = None
    """split.json of another run to use instead of drawing a split"""
    folds: FoldCount | None = None
    """train so many networks, each tested on its part of the patients, into RUN/fold_0 and so on, one after
    another; --epochs and --max-minutes count per fold"""
    fold: CountOrZero | None = None
    """with --folds, train this one alone, from 0"""
    hold_out_dir: str | None = None
    """cohort kept for testing: its patients are left out by id, mapping and content of the scans"""
    different: str | None = None
    """CSV file, two columns of case ids: pairs that look alike, and a person saw that they are two people"""
    skip_bad: bool = False
    """check every case first and leave out those with errors; see skipped.csv"""
    cache_dir: str = "cache"
    """folder of decoded volumes"""
    cohort_weights: tuple[Positive, ...] = ()
    """with several folders in --data-dir, how often each is drawn, 1 1 2 for a quarter, a quarter, a half;
    default: as its slices are many"""

    @property
    def weight_of_cohort(self) -> dict[str, float]:
        """{cohort: weight} of --cohort-weights; empty without it."""
        return several.pair_weights(several.list_folders(self.data_dir), self.cohort_weights)


@dataclass(frozen=True)
class Selection:
    """What a run works on, and the ids of the cases that were left out."""

    cases: list[Case]
    split: dict[str, Any]
    data_kind: str  # "phantom", "real", or "mixed"
    held_out: list[str]
    skipped: list[str]
    different: leakage.Pairs = frozenset()  # pairs that a person declared different
    joined: dict[str, str] = field(default_factory=dict)  # {case id: patient} of `join_patients`

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
            **({"joined_patients": self.joined} if self.joined else {}),
        }


def select_cases(source: TrainingSource, seed: int, folder: Path, resumed: bool) -> Selection:
    """Return a run's cases and split, and write into its folder which were left out and why.

    A resumed run keeps what its folder says already.
    """
    _ = source.weight_of_cohort  # refuses weights that do not fit the folders, before anything is read
    different = leakage.read_different(source.different)
    all_cases, skipped = find_sound_cases(source, folder)
    masked = with_references(source, all_cases)
    check_regions(masked, source.regions)
    joined = join_patients(source, masked, different)
    masked = several.rename_patients(masked, joined)
    cases = hold_out(source, masked, folder, resumed)
    if likely_visits := describe_likely_visits(cases):
        log.warning("%s", likely_visits)
    kept = {case.case_id for case in cases}
    held_out = [case.case_id for case in masked if case.case_id not in kept]
    if (folder / "split.json").exists() and resumed:
        split = splits.read_split(folder / "split.json")
    else:
        check_enough_left(source, masked, cases)
        if source.folds:
            split = folds.draw_fold(folder.parent, cases, source.folds, source.fold, seed)
        else:
            split = choose_split(source, cases, seed, {*held_out, *skipped})
        write_json(folder / "split.json", split)
    return Selection(cases, split, find_kind(masked), held_out, skipped, different, joined)


def with_references(source: TrainingSource, cases: Sequence[Case]) -> list[Case]:
    """Return the cases that have a mask; InputError where a cohort has none."""
    names = several.list_cohorts(cases)
    if len(names) < 2:
        return with_reference(cases, source.place)
    for name in names:
        with_reference([case for case in cases if case.cohort == name], name)
    return [case for case in cases if case.mask]


def find_kind(cases: Sequence[Case]) -> str:
    """Return "phantom" or "real", or "mixed" where there are cases of both."""
    return name_kind(map(is_phantom, cases))


def join_patients(source: TrainingSource, cases: Sequence[Case], different: leakage.Pairs) -> dict[str, str]:
    """Return {case id: patient} of the cases whose patient is in another cohort too, by ids or by content.

    Content finds copies of a scan. Another preparation of it, such as a skull-stripped one, is found by ids
    and mapping sheets alone.

    All cases of such a patient get the first of the patient's ids, so that a split keeps them together.
    Pairs in `different` were looked at by a person and stay two.
    """
    names = several.list_cohorts(cases)
    if len(names) < 2:
        return {}
    channel = source.modalities.index(fingerprint_modality(source.modalities))
    prepared = cache.prepare_cases(cases, source.modalities, source.regions, source.cache_dir)
    identities = {
        name: [leakage.identify_case(case, channel) for case in prepared if case.cohort == name]
        for name in names
    }
    found, earlier = [], identities[names[0]]
    for name in names[1:]:
        found.append(leakage.find_leakage(name, identities[name], earlier, different=different))
        earlier = [*earlier, *identities[name]]
    pairs = leakage.select_proven(pd.concat(found, ignore_index=True))
    for row in pairs.itertuples():
        log.info(
            "one patient in two cohorts, kept in one part of the split: %s by %s",
            leakage.describe_row(row),
            row.evidence,
        )
    several.warn_of_unmapped(cases)
    patient_of = {case.case_id: case.patient_id for case in cases}
    group_of = group_ids([patient_of[row.case], patient_of[row.training_case]] for row in pairs.itertuples())
    first_of = {patient: min(group) for patient, group in group_of.items()}
    return {
        case.case_id: first_of[case.patient_id]
        for case in cases
        if first_of.get(case.patient_id, case.patient_id) != case.patient_id
    }


def find_sound_cases(source: TrainingSource, folder: Path) -> tuple[list[Case], list[str]]:
    """Return the cases of the source and the ids (or files) of those that --skip-bad leaves out."""
    if not source.skip_bad:
        cases = layouts.find_cases(source, source.modalities)
        layouts.log_cohorts(cases)
        return cases, []
    cases, problems = check.check_cohort(source, source.modalities, every_file=False)
    errors = [problem for problem in problems if problem.severity == "error"]
    check.write_problems(folder / "skipped.csv", errors)
    faulty = check.has_error(problems)
    sound = [case for case in cases if case.case_id not in faulty]
    if not sound:
        raise InputError(source.place, f"all {len(cases)} cases have errors", "look at them with --check")
    layouts.log_cohorts(sound)
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
        write_table(path, left_out)
    left_out = read_columns(path, "start the run again", ("case", "patient", "evidence", "known_as"))
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
            f"{before - left} of the {before} patients in {source.place} are in it and left out, see "
            f"held_out.csv; {left} remain, too few for train, validation and test",
            "hold out a cohort of other patients, or train on more",
        )


def choose_split(
    source: TrainingSource, cases: Sequence[Case], seed: int, left_out: set[str]
) -> dict[str, Any]:
    """Return the split of --split, without the cases that are left out of the run, or a new one."""
    if not source.split:
        return several.split_cohorts(cases, seed)
    split = splits.read_split(source.split)
    return splits.without_cases(split, left_out) if left_out else split


def check_shown(cases: Sequence[PreparedCase], regions: Sequence[str], data_dir: str) -> None:
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
        name: splits.cases_of_split(selection.cases, selection.split, name, source.place)
        for name in ("train", "validation")
    }
    test_ids = set(selection.split["test"])  # of which some may be gone since
    parts["test"] = [case for case in selection.cases if case.case_id in test_ids]
    everyone = [case for members in parts.values() for case in members]
    all_prepared = cache.prepare_for_all_ranks(everyone, source.modalities, source.regions, source.cache_dir)
    check_shown(all_prepared, source.regions, source.place)
    prepared = iter(all_prepared)
    by_part = {name: list(itertools.islice(prepared, len(members))) for name, members in parts.items()}
    channel = source.modalities.index(fingerprint_modality(source.modalities))
    identities = {
        name: [leakage.identify_case(case, channel) for case in own] for name, own in by_part.items()
    }
    leakage.check_parts(identities, selection.different)
    return by_part


def prepare_phantoms(source: TrainingSource, pixel_mm: float) -> list[PreparedCase]:
    """Return the prepared phantoms of --phantom-share, on every rank; they are made in the cache folder.

    `pixel_mm` is what a pixel of the network's input spans in the cases, so that heads are as large there.
    """
    directory = Path(source.cache_dir) / "phantoms"
    if ranks.is_first_here():
        phantom.write_training_phantoms(directory, pixel_mm)
    ranks.wait_for_all()
    folder, _, ids = phantom.training_phantoms(directory, pixel_mm)
    cases = layouts.find_cases(CaseSource(str(folder)), source.modalities)
    cases = [case for case in cases if case.case_id in ids]
    return cache.prepare_for_all_ranks(cases, source.modalities, source.regions, source.cache_dir)
