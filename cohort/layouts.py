"""Which files below a folder are cases, and the label convention of each cohort.

A layout is how a data set names and places its files; `cohort/resolvers.py` lists them. `find_cases` detects
them by what is there, or looks for one alone where the user names it.
"""

import csv
import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from cohort.cases import MODALITIES, Case
from cohort.conventions import settle_conventions
from cohort.patients import find_sheets, map_patients, patient_of
from cohort.pictures import RGB_CHANNELS, is_colour
from cohort.resolvers import LAYOUTS, NEW_IDS, choose_mask, find_gap, is_nifti, modality_named, stem_of
from cohort.several import (
    DataDir,
    check_folders,
    join_cohorts,
    list_cohorts,
    list_folders,
    name_cohorts,
    pair_layouts,
    show_folders,
)
from runtime.command import Range, from_plain
from runtime.errors import InputError
from runtime.files import WRITTEN, is_written_by_us, protect_inputs
from runtime.folders import cannot_read, raise_error, walk_tree
from runtime.log import log
from runtime.tables import unguard_cell

Channel = Annotated[int, Range(0, 2), tyro.conf.arg(metavar="0|1|2")]
LayoutName = Literal[
    "auto",
    "brats2019",
    "brats2020",
    "brats2021",
    "brats2023",
    "brats2024",
    "brats-met",
    "brats-ped",
    "upenn",
    "ucsf",
    "bids",
    "nnunet",
    "msd",
    "slices",
]
Folders = Annotated[str | tuple[str, ...] | None, tyro.conf.arg(metavar="DIR [DIR ...]")]
Layouts = Annotated[
    LayoutName | tuple[LayoutName, ...], tyro.conf.arg(metavar=f"{{{','.join(get_args(LayoutName))}}} [...]")
]
NO_PATIENT = (
    r"(?i)(?:.*(?:screen.?shot|preview|thumb|snapshot|overlay|montage).*|fig|figure|plot|curves?)[\W_\d]*"
)
SHOWN = 5  # names of files shown where there is no case
BY_ID = ("brats2024", "brats-met", "brats-ped", "upenn", "ucsf", "bids")  # ids no other layout has


@dataclass(frozen=True)
class CaseSource:
    """Where cases are and how they are read; commands have it among their settings."""

    data_dir: Folders = None
    """folder with the cases, or several, one per cohort; default: data/BraTS2021, or the demo's phantoms
    without it"""
    layout: Layouts = "auto"
    """how files are named and placed, for all folders or one per folder; auto detects it by what is there"""
    mapping: str | None = None
    """CSV sheet of ids, beside the mapping sheets found with the cases"""
    slice_channel: Channel = 1
    """channel of RGB slices that holds FLAIR: 0, 1 or 2"""

    @property
    def place(self) -> str:
        """The folders as they were typed."""
        return show_folders(self.data_dir)


# ------------------------------------------------------------------------------------------------------------
# Finding cases
# ------------------------------------------------------------------------------------------------------------


def offer_channels(
    modalities: dict[str, tuple[Path, ...]], slice_channel: int
) -> dict[str, tuple[Path, ...]]:
    """Return the modalities of a case of slices: T1 and T1ce too where the first file is RGB.

    They are the red and the blue around a green FLAIR. Where FLAIR is said to be another channel the order is
    not known, and FLAIR is all there is.
    """
    paths = modalities["flair"]
    if slice_channel != RGB_CHANNELS["flair"] or not is_colour(paths[0]):
        return modalities
    return {name: paths for name in MODALITIES if name in RGB_CHANNELS}


class Series(NamedTuple):
    """A numbered series of pictures, which may be a case or somebody's screenshots."""

    case: Case
    problem: InputError | None


def resolve_folder(
    folder: Path, names: Sequence[str], layout: str, cohort: str = "", slice_channel: int = 1
) -> list[Series]:
    """Return the cases in one folder; with layout "auto" of every layout whose ids they have.

    A name may be that of a folder with one NIfTI file in it, as archives unpacked twice leave behind.
    """
    cases = []
    for name, row in LAYOUTS.items():
        if layout not in ("auto", name):
            continue
        for found in row.resolve(folder, names):
            if layout == name or re.fullmatch(row.ids, found.case_id):
                modalities = {key: tuple(map(_enter, paths)) for key, paths in found.modalities.items()}
                if name == "slices":
                    modalities = offer_channels(modalities, slice_channel)
                case = Case(
                    case_id=found.case_id,
                    patient_id=patient_of(found.case_id),
                    cohort=cohort,
                    layout=name,
                    convention=found.convention or row.convention,
                    modalities=modalities,
                    mask=tuple(map(_enter, found.mask)),
                    slice_channel=slice_channel,
                    volume_index=found.volume_index,
                )
                cases.append(Series(case, found.problem))
    return cases


def _enter(path: Path) -> Path:
    """Return a path, or the one NIfTI file in the folder of that name."""
    if not is_nifti(path.name) or not path.is_dir():
        return path
    inside = [file for file in path.glob("[!.]*") if is_nifti(file.name) and file.is_file()]
    return inside[0] if len(inside) == 1 else path


def walk_folders(
    root: Path, seen: list[str], report: Callable[[InputError], None] = raise_error
) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, sorted names of its files) for a root and all below it, without what we wrote ourselves.

    What `walk_tree` cannot enter is reported. Hidden files and folders are what killed writers leave. A
    folder named like a NIfTI file that holds one such file counts as that file. `seen` collects some names of
    files, to show where nothing is found. Predictions are left out and said once.
    """
    left_out: list[Path] = []
    folders_of_masks: set[Path] = set()  # of picture cases
    for folder, folders, files in walk_tree(root, report):
        names = [name for name in files if not name.startswith(".")]
        if folder != root and folder.name == "predictions":
            left_out.append(folder)
            folders.clear()
            continue
        try:
            predicted = names_of_predictions(folder, names)
            if WRITTEN in files:
                predicted |= {name for name in names if is_written_by_us(folder / name)}
        except OSError as error:  # then masks that inference wrote would be references
            report(cannot_read(error.filename or folder, error))
            continue
        folders_of_masks |= {folder / name for name in predicted if name in folders}
        if folder in folders_of_masks:
            predicted |= {name for name in names if re.search(r"_mask\.\w+$", name)}
        if predicted & set(names):
            left_out.append(folder)
            names = [name for name in names if name not in predicted]
        folders[:] = [name for name in folders if not name.startswith(".")]
        unpacked = [name for name in folders if _enter(folder / name) != folder / name]
        folders[:] = [name for name in folders if name not in unpacked]
        names = sorted(names + unpacked)
        seen += [str((folder / name).relative_to(root)) for name in names[: max(0, SHOWN - len(seen))]]
        yield folder, names
    if left_out:
        first = ", ".join(map(str, left_out[:3])) + (" and others" if len(left_out) > 3 else "")
        log.warning("masks that inference wrote are neither cases nor references and left out: %s", first)


def names_of_predictions(folder: Path, names: Sequence[str]) -> set[str]:
    """Return the names of the masks, or of folders of them, that inference wrote into a folder.

    Its volumes.csv lists them. Where nothing but masks is there, masks of an earlier run are ours too.
    """
    if "volumes.csv" not in names:
        return set()
    try:
        with (folder / "volumes.csv").open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if not {"case", "region", "volume_ml", "mask"} <= set(rows.fieldnames or ()):
                return set()
            listed = {Path(unguard_cell(row["mask"])).name for row in rows if row["mask"]}
    except (UnicodeDecodeError, csv.Error):
        return set()
    volumes = [name for name in names if is_nifti(name)]
    masks = [name for name in volumes if modality_named(name) == "seg"]
    return listed | set(masks) if set(volumes) <= listed | set(masks) else listed


def scan_cases(
    source: CaseSource, errors: list[InputError] | None = None, names: Sequence[str] | None = None
) -> list[Case]:
    """Return every case of a source, sorted by id, whatever modalities it has.

    What is wrong with one folder or id is appended to `errors` where there is such a list, and its cases are
    left out; without one it is raised. `names` are those of several cohorts whose folders have moved.
    """
    assert source.data_dir is not None, "the data folder is chosen before cases are looked for"
    folders = list_folders(source.data_dir)
    if not folders:
        raise InputError("--data-dir", "names no folder", "give the folder that holds the cases")
    check_folders(folders)
    scanned = [
        scan_folder(dataclasses.replace(source, data_dir=folder, layout=layout), errors)
        for folder, layout in zip(folders, pair_layouts(folders, source.layout), strict=True)
    ]
    given = Path(source.mapping) if source.mapping else None
    if len(scanned) == 1:
        return map_patients(*scanned[0], given)
    return join_cohorts(names or name_cohorts(folders), scanned, given)


def scan_folder(source: CaseSource, errors: list[InputError] | None) -> tuple[list[Case], list[Path]]:
    """Return every case below one folder, patients as their ids say, and the mapping sheets found with them.

    See `scan_cases`.
    """
    root = Path(source.data_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder", "give the folder that holds the cases")

    def report(error: InputError) -> None:
        if errors is None:
            raise error
        errors.append(error)

    found: list[Series] = []
    known_errors = len(errors or ())  # of other folders
    visited, seen = [root.resolve().parent], []
    for folder, names in walk_folders(root, seen, report):
        visited += [folder] if any(name.lower().endswith(".csv") for name in names) else []
        try:
            found += resolve_folder(folder, names, source.layout, root.resolve().name, source.slice_channel)
        except InputError as error:
            report(error)
        except OSError as error:  # of what lies beside the folder, such as its masks
            report(cannot_read(error.filename or folder, error))
    cases = [series.case for series in found if series.case.layout != "slices"]
    cases = join_folders(cases, report)
    pictures = [series for series in found if series.case.layout == "slices"]
    for series in choose_pictures(pictures, cases):
        if series.problem:
            report(series.problem)
        else:
            cases.append(series.case)
    if not cases and len(errors or ()) == known_errors:
        raise no_case(root, source.layout, seen)
    cases.sort(key=lambda case: case.case_id)
    for case, following in itertools.pairwise(cases):
        if case.case_id == following.case_id:
            places = f"in {folder_of(case)} and in {folder_of(following)}"
            report(InputError(root, f"case {case.case_id} is there twice, {places}", "remove or rename one"))
    count = Counter(case.case_id for case in cases)
    protect_inputs(path for case in cases for path in case.files)
    unique = settle_conventions([case for case in cases if count[case.case_id] == 1])
    warn_of_gaps(unique)
    return unique, find_sheets(visited)


def folder_of(case: Case) -> Path:
    """Return the folder of a case's first file."""
    return next(iter((*case.modalities.values(), case.mask)))[0].parent


def join_folders(cases: Sequence[Case], report: Callable[[InputError], None]) -> list[Case]:
    """Return the cases with the masks that their data set keeps in another folder: BIDS and UPENN-GBM.

    Images of a BIDS derivative count only where the raw data has none of the case.
    """
    joined = [case for case in cases if case.layout not in ("bids", "upenn")]
    by_id: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.layout in ("bids", "upenn"):
            by_id[case.case_id].append(case)
    for parts in by_id.values():
        images = [part for part in parts if part.modalities]
        raw = [part for part in images if "derivatives" not in folder_of(part).parts]
        images = raw or images
        masks = [part.mask[0] for part in parts if part.mask and not part.modalities]
        masks += [part.mask[0] for part in parts if part.mask and part.modalities and part not in images]
        if len(images) != 1 or images[0].mask or not masks:
            joined += images  # masks alone, such as UPENN's automated ones, are no case
            continue
        try:
            joined.append(dataclasses.replace(images[0], mask=(choose_mask(masks),)))
        except InputError as error:
            report(error)
    return joined


def choose_pictures(pictures: Sequence[Series], others: Sequence[Case]) -> list[Series]:
    """Return the series of pictures that are cases, given the NIfTI cases beside them; say which are not.

    Pictures in the folder of a NIfTI case, or of its id, never are. Where there is any NIfTI case a series
    needs masks or a folder of its name; elsewhere it needs more than one slice where others have more, and
    a name that is not that of a figure.
    """
    ids = {case.case_id for case in others}
    folders = {folder_of(case) for case in others}
    longest = max((len(series.case.modalities["flair"]) for series in pictures), default=0)

    def is_case(case: Case) -> bool:
        folder = folder_of(case)
        if case.case_id in ids or folder in folders:
            return False
        if case.mask:
            return True
        if re.fullmatch(NO_PATIENT, case.case_id):
            return False
        is_at_home = case.case_id in (folder.name, folder.parent.name)
        return is_at_home or (not others and (len(case.modalities["flair"]) > 1 or longest == 1))

    chosen, left_out = [], []
    for series in pictures:
        (chosen if is_case(series.case) else left_out).append(series)
    if left_out:
        first = left_out[0].case.modalities["flair"][0]
        log.warning("%d series of pictures are no cases and left out, first %s", len(left_out), first)
    return chosen


def warn_of_gaps(cases: Sequence[Case]) -> None:
    """Log how many cases of slices have gaps in their numbers."""
    slices = [case for case in cases if case.layout == "slices"]
    gaps = [(case, gap) for case in slices if (gap := find_gap(case.modalities["flair"])) is not None]
    if gaps:
        case, gap = gaps[0]
        log.warning(
            "%d case(s) have gaps in the numbers of their slices, which are taken as neighbours; first %s, "
            "without slice %d",
            len(gaps),
            case.case_id,
            gap,
        )


def no_case(root: Path, layout: str, seen: Sequence[str]) -> InputError:
    """Return the error of a folder without cases, with some of the names that are there."""
    there = f"there are {', '.join(seen)}" if seen else "it holds no file"
    if layout != "auto":
        return InputError(
            root,
            f"no case in the layout {layout}; {there}",
            "--layout auto detects the layout by what is there",
        )
    return InputError(
        root,
        f"no case found; {there}",
        "looked for <case>_flair.nii.gz (BraTS to 2021, UPENN-GBM, UCSF-PDGM), <case>-t2f.nii.gz (BraTS from "
        "2023), sub-<id>_FLAIR.nii.gz (BIDS), imagesTr/BRATS_001.nii.gz (MSD), imagesTr/<case>_0000.nii.gz "
        "with a dataset.json that names channels and labels (nnU-Net), and <case>_<z>.png or .tif",
    )


def find_cases(
    source: CaseSource,
    modalities: Sequence[str] = ("flair",),
    partial: bool = False,
    names: Sequence[str] | None = None,
) -> list[Case]:
    """Return every case of a source, sorted by id, with its patient and its cohort's label convention.

    Each case must have the modalities asked for, with `partial` one of them. Raises InputError where the
    folder is missing or holds no case, a case lacks a modality, or an id occurs twice. `names` is as in
    `scan_cases`.
    """
    cases = scan_cases(source, names=names)
    for case in cases:
        if missing := find_lacking(case, modalities, partial):
            raise missing_modality(case, missing[0])
    return cases


def find_lacking(case: Case, modalities: Sequence[str], partial: bool) -> list[str]:
    """Return the modalities for want of which a case cannot be used; with `partial` it needs one of them."""
    missing = [name for name in modalities if name not in case.modalities]
    return missing if not partial or len(missing) == len(modalities) else []


def find_cases_of_run(settings: Mapping[str, Any], data_dir: DataDir) -> list[Case]:
    """Return the cases below a run's folder, or its folders, as the run with these settings read them.

    Where it left bad cases out, those that cannot be told or lack a modality are left out again. Several
    folders that have moved are taken in the order of the run's, and keep the names of these.
    """
    folders, before = list_folders(data_dir), list_folders(settings.get("data_dir", data_dir))
    if len(folders) != len(before) > 1:
        raise InputError(
            f"--data-dir {show_folders(folders)}",
            f"the run was trained on {len(before)} folders, {show_folders(before)}",
            "name as many, in that order",
        )
    names = name_cohorts(before) if len(before) > 1 else None
    source = dataclasses.replace(from_plain(CaseSource, settings), data_dir=folders)
    needed = set(settings["modalities"])
    if settings.get("skip_bad"):
        return [case for case in scan_cases(source, [], names) if needed <= set(case.modalities)]
    return find_cases(source, settings["modalities"], names=names)


def missing_modality(case: Case, name: str) -> InputError:
    """Return the error of a case without a modality."""
    folder = next(iter((*case.modalities.values(), case.mask)))[0].parent
    if case.layout == "slices":
        return InputError(
            folder,
            f"the pictures of case {case.case_id} hold no {name}",
            "grey slices are FLAIR; RGB ones are T1, FLAIR and T1ce unless --slice-channel says otherwise",
        )
    return InputError(folder, f"case {case.case_id} has no {name} file", "add it or leave the case out")


def cases_of_files(paths: Sequence[Path], modalities: Sequence[str]) -> list[Case]:
    """Return one case a NIfTI file, for a network of one modality; the file's name is the case's id.

    Raises InputError where a name says that the file is another modality than the network's, or a mask.
    """
    if len(modalities) != 1:
        raise InputError(
            paths[0], f"the network needs {', '.join(modalities)}", "give the case's folder, not one file"
        )
    (wanted,) = modalities
    cases = []
    protect_inputs(paths)
    for path in paths:
        if not is_nifti(path.name):
            raise InputError(path, "not a .nii or .nii.gz file", "give PNG and TIF cases as folders")
        named = [found.case for found in resolve_folder(path.absolute().parent, [path.name], "auto", "files")]
        said = modality_named(path.name)
        kinds = {said} - {None}
        if named and said in (None, wanted):  # else the name says more than its ending
            kinds = set(named[0].modalities) or {"seg"}
        channel = re.search(r"_(0\d{3})$", stem_of(path.name))
        if not named and not kinds and channel and int(channel[1]) > 0:
            kinds = {f"channel {int(channel[1])} of a set"}
        if kinds and wanted not in kinds:
            kind = next(iter(kinds))
            says = {"seg": "a mask", "other": "another sequence"}.get(kind, kind)
            raise InputError(
                path,
                f"its name says that it is {says}, and the network takes {wanted}",
                f"give the {wanted} file, or the case's folder, or rename the file where the name is wrong",
            )
        own = {wanted: (path,)}
        if named:
            cases.append(dataclasses.replace(named[0], modalities=own, mask=()))
            continue
        case_id = stem_of(path.name)
        layout = "brats2023" if re.fullmatch(NEW_IDS, case_id) else "brats2021"
        layout = next((name for name in BY_ID if re.fullmatch(LAYOUTS[name].ids, case_id)), layout)
        convention = LAYOUTS[layout].convention
        cases.append(Case(case_id, patient_of(case_id), "files", layout, convention, own, ()))
    return cases


def log_cohorts(cases: Sequence[Case]) -> None:
    """Log the lines of `log_cases`, per cohort where there are several."""
    names = list_cohorts(cases)
    for name in sorted(names):
        log_cases([case for case in cases if case.cohort == name], f"{name}: " if len(names) > 1 else "")


def log_cases(cases: Sequence[Case], whose: str = "") -> None:
    """Log a line per layout: how many cases, masks and modalities, and what is out of the ordinary."""
    for name in sorted({case.layout for case in cases}):
        group = [case for case in cases if case.layout == name]
        counts = sorted({len(case.modalities) for case in group})
        modalities = f"{counts[0]} {'to ' + str(counts[-1]) + ' ' if len(counts) > 1 else ''}"
        line = (
            f"{LAYOUTS[name].title}: {len(group):,} case{'s' if len(group) > 1 else ''}, "
            f"{sum(bool(case.mask) for case in group):,} with masks, {modalities}"
            f"modalit{'y' if counts[-1] == 1 else 'ies'}"
        )
        patients = len({case.patient_id for case in group})
        line += f", {patients:,} patients" if patients != len(group) else ""
        usual = LAYOUTS[name].convention
        convention = group[0].convention
        if name == "nnunet":
            line += f", labels as {convention}"
        elif convention == "binary" and usual != "binary":
            line += ", masks of the whole tumour alone"
        elif convention != usual:
            line += f", ET is {4 if convention == 'brats' else 3}"
        log.info("%s%s", whose, line)
