"""Which files below a folder are cases: one resolver a layout, and the label convention of each cohort.

A layout is how a data set names and places its files. LAYOUTS lists them; `find_cases` tells them by what is
there, or looks for one alone where the user names it.
"""

import dataclasses
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from cohort.cases import MODALITIES, RGB_CHANNELS, Case, is_colour, is_stack, read_nifti_volume
from cohort.labels import round_labels
from cohort.patients import find_sheets, map_patients, patient_of
from runtime.command import Range, from_plain
from runtime.errors import InputError
from runtime.files import WRITTEN, is_written_by_us, protect_inputs
from runtime.log import log

Channel = Annotated[int, Range(0, 2), tyro.conf.arg(metavar="0|1|2")]
LayoutName = Literal["auto", "brats2019", "brats2020", "brats2021", "brats2023", "brats2024", "msd", "slices"]
HYPHEN_WORDS = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "seg": "seg"}
MSD_ORDER = ("flair", "t1", "t1ce", "t2")  # dataset.json of Task01: FLAIR, T1w, t1gd, T2w
MASKS_TO_DECIDE, MASKS_TO_READ = 3, 24  # how many masks tell 3 from 4, and how many are read to find them


@dataclass(frozen=True)
class CaseSource:
    """Where cases are and how they are read; commands have it among their settings."""

    data_dir: str | None = None
    """folder with the cases; default: data/BraTS2021, or the demo's phantoms without it"""
    layout: LayoutName = "auto"
    """how files are named and placed; auto detects it by what is there"""
    mapping: str | None = None
    """CSV sheet of ids, beside the mapping sheets found with the cases"""
    slice_channel: Channel = 1
    """channel of RGB slices that holds FLAIR: 0, 1 or 2"""


class Found(NamedTuple):
    """The files of one case as a resolver finds them."""

    case_id: str
    modalities: dict[str, tuple[Path, ...]]
    mask: tuple[Path, ...]
    volume_index: Mapping[str, int] = {}


class Layout(NamedTuple):
    """One row of LAYOUTS."""

    title: str
    ids: str  # pattern of the case ids `auto` takes for this layout
    convention: str  # of its masks, unless they show another
    resolve: Callable[[Path, Sequence[str]], list[Found]]


# ------------------------------------------------------------------------------------------------------------
# Resolvers: (folder, its file names, sorted) -> the cases whose files lie in it
# ------------------------------------------------------------------------------------------------------------


def _resolve_by_suffix(
    folder: Path, names: Sequence[str], joint: str, words: Mapping[str, str]
) -> list[Found]:
    """Return the cases whose files are `<case><joint><word>.nii[.gz]`."""
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(rf"(.+){joint}({'|'.join(words)})\.nii(\.gz)?", name):
            case_id, modality = match[1], words[match[2]]
            if modality in files[case_id]:
                raise InputError(folder / name, "is there as .nii and as .nii.gz", "remove one of the two")
            files[case_id][modality] = folder / name
    return [
        Found(
            case_id,
            {name: (found[name],) for name in MODALITIES if name in found},
            (found["seg"],) if "seg" in found else (),
        )
        for case_id, found in sorted(files.items())
    ]


def resolve_underscores(folder: Path, names: Sequence[str]) -> list[Found]:
    """BraTS 2019 and 2021: `<case>_{flair,t1,t1ce,t2,seg}.nii[.gz]`."""
    return _resolve_by_suffix(folder, names, "_", {name: name for name in (*MODALITIES, "seg")})


def resolve_brats2020(folder: Path, names: Sequence[str]) -> list[Found]:
    """BraTS 2020: as 2021, but the mask of case 355 is named `W39_1998.09.19_Segm.nii`."""
    found = resolve_underscores(folder, names)
    astray = [folder / name for name in names if re.fullmatch(r"W\d+_.+_Segm\.nii(\.gz)?", name)]
    if len(found) == 1 and not found[0].mask and len(astray) == 1:
        return [found[0]._replace(mask=(astray[0],))]
    return found


def resolve_hyphens(folder: Path, names: Sequence[str]) -> list[Found]:
    """BraTS 2023 and 2024 GLI: `<case>-{t1n,t1c,t2w,t2f,seg}.nii[.gz]`."""
    return _resolve_by_suffix(folder, names, "-", HYPHEN_WORDS)


def resolve_msd(folder: Path, names: Sequence[str]) -> list[Found]:
    """MSD Task01: `imagesTr/<case>.nii.gz` of four volumes, masks in `labelsTr`; imagesTs has none."""
    if folder.name not in ("imagesTr", "imagesTs"):
        return []
    found = []
    for name in names:
        if match := re.fullmatch(r"(.+?)\.nii(\.gz)?", name):
            labels = folder.with_name("labelsTr") / match[1]
            masks = [labels.with_name(match[1] + suffix) for suffix in (".nii.gz", ".nii")]
            mask = next((path for path in masks if path.is_file()), None)
            found.append(
                Found(
                    match[1],
                    dict.fromkeys(MODALITIES, (folder / name,)),
                    (mask,) if mask and folder.name == "imagesTr" else (),
                    {modality: index for index, modality in enumerate(MSD_ORDER)},
                )
            )
    return found


def resolve_stacks(folder: Path, names: Sequence[str]) -> tuple[list[Found], list[str]]:
    """Return (a case for each multi-page TIF `<case>.tif` with its `<case>_mask.tif`, the names left over).

    A multi-page `<case>_<z>.tif` whose neighbours have one page each is left over: it is no case of its own.
    """
    stem_of = {name: Path(name).stem for name in names if re.search(r"\.tiff?$", name, re.IGNORECASE)}
    masks = {stem[:-5]: name for name, stem in stem_of.items() if stem.lower().endswith("_mask")}
    stacks = [name for name in stem_of if name not in masks.values() and is_stack(folder / name)]
    numbered = (re.fullmatch(r"(.+)_\d+\.(png|tiff?)", name, re.IGNORECASE) for name in {*names} - {*stacks})
    series = {match[1] for match in numbered if match}
    found, used = [], set()
    for name in stacks:
        stem = stem_of[name]
        if re.sub(r"_\d+$", "", stem) in series:
            continue
        mask = (masks[stem],) if stem in masks else ()
        found.append(Found(stem, {"flair": (folder / name,)}, tuple(folder / own for own in mask)))
        used |= {name, *mask}
    return found, [name for name in names if name not in used]


def resolve_slices(folder: Path, names: Sequence[str]) -> list[Found]:
    """PNG and TIF slices: `<case>_<z>.png|tif` and `<case>_<z>_mask.*`, z sorted as a number.

    A multi-page TIF is a whole case: `<case>.tif` and `<case>_mask.tif`. Grey slices are FLAIR. Of RGB slices
    the chosen channel is FLAIR; `offer_channels` adds the others.
    """
    stacks, names = resolve_stacks(folder, names)
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    masks: dict[str, dict[int, Path]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(r"(.+)_(\d+)(_mask)?\.(png|tiff?)", name, re.IGNORECASE):
            chosen = masks if match[3] else slices
            if int(match[2]) in chosen[match[1]]:
                raise InputError(
                    folder / name, f"slice {int(match[2])} is there twice", "remove one of the two files"
                )
            chosen[match[1]][int(match[2])] = folder / name
    found = []
    for case_id, by_number in sorted(slices.items()):
        numbers = sorted(by_number)
        if missing := set(range(numbers[0], numbers[-1])) - set(numbers):
            raise InputError(
                folder, f"slice {min(missing)} of {case_id} is missing", "neighbours must be adjacent"
            )
        if masks[case_id] and (unmasked := set(numbers) - set(masks[case_id])):
            raise InputError(
                by_number[min(unmasked)], "this slice has no _mask file though others of its case have"
            )
        if orphans := set(masks[case_id]) - set(numbers):
            raise InputError(
                masks[case_id][min(orphans)], "this mask has no slice", "add it or remove the mask"
            )
        mask = tuple(masks[case_id][z] for z in numbers) if masks[case_id] else ()
        found.append(Found(case_id, {"flair": tuple(by_number[z] for z in numbers)}, mask))
    return found + stacks


# Among layouts of like file names an id belongs to one. BraTS 2024 GLI counts its timepoints from 100, 2023
# from 0; the paediatric cohort (PED) has labels of its own and is none of these.
LAYOUTS: dict[str, Layout] = {
    "brats2019": Layout("BraTS 2019", r"(?i:brats1[5-9])_.+", "brats", resolve_underscores),
    "brats2020": Layout("BraTS 2020", r"BraTS20_.+", "brats", resolve_brats2020),
    "brats2021": Layout("BraTS 2021", r"(?!(?i:brats1[5-9])_|BraTS20_).+", "brats", resolve_underscores),
    "brats2023": Layout(
        "BraTS 2023", r"(?!BraTS-PED|BraTS-GLI-\d{5}-[1-9]\d\d).+", "brats2023", resolve_hyphens
    ),
    "brats2024": Layout("BraTS 2024", r"BraTS-GLI-\d{5}-[1-9]\d\d", "brats2024", resolve_hyphens),
    "msd": Layout("MSD Task01", r"BRATS_\d+", "msd", resolve_msd),
    "slices": Layout("PNG/TIF slices", r".+", "binary", resolve_slices),
}


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


def resolve_folder(
    folder: Path, names: Sequence[str], layout: str, cohort: str = "", slice_channel: int = 1
) -> list[Case]:
    """Return the cases in one folder; with layout "auto" of every layout whose ids they have."""
    cases = []
    for name, row in LAYOUTS.items():
        if layout not in ("auto", name):
            continue
        for found in row.resolve(folder, names):
            if layout == name or re.fullmatch(row.ids, found.case_id):
                case = Case(
                    case_id=found.case_id,
                    patient_id=patient_of(found.case_id),
                    cohort=cohort,
                    layout=name,
                    convention=row.convention,
                    modalities=offer_channels(found.modalities, slice_channel)
                    if name == "slices"
                    else found.modalities,
                    mask=found.mask,
                    slice_channel=slice_channel,
                    volume_index=found.volume_index,
                )
                cases.append(case)
    return cases


def detect_convention(cases: Sequence[Case], usual: str) -> str:
    """Return "brats" or "brats2023", by the value, 4 or 3, that most masks of a cohort hold.

    A cohort decides, not a case: masks spread over it are read until three hold one of the two. `usual` is
    returned where they do not tell. Unreadable masks, and those that hold both, are left to who reads them.
    """
    masked = [case for case in cases if case.mask]
    votes = {"brats": 0, "brats2023": 0}
    order = np.linspace(0, len(masked) - 1, min(len(masked), MASKS_TO_READ)).astype(int)
    for index in order:
        try:
            labels = round_labels(read_nifti_volume(masked[index].mask[0])[0])
        except InputError:
            continue
        has_three, has_four = bool((labels == 3).any()), bool((labels == 4).any())
        if has_three != has_four:
            votes["brats" if has_four else "brats2023"] += 1
        if sum(votes.values()) == MASKS_TO_DECIDE:
            break
    other = next(name for name in votes if name != usual)
    return other if votes[other] > votes[usual] else usual


def settle_conventions(cases: Sequence[Case]) -> list[Case]:
    """Return the cases with the label convention of their cohort: one per layout."""
    convention_of = {}
    for name in sorted({case.layout for case in cases}):
        usual = LAYOUTS[name].convention
        group = [case for case in cases if case.layout == name]
        convention_of[name] = detect_convention(group, usual) if usual in ("brats", "brats2023") else usual
    return [dataclasses.replace(case, convention=convention_of[case.layout]) for case in cases]


def scan_cases(source: CaseSource, errors: list[InputError] | None = None) -> list[Case]:
    """Return every case of a source, sorted by id, whatever modalities it has.

    What is wrong with one folder or id is appended to `errors` where there is such a list, and its cases are
    left out; without one it is raised.
    """
    assert source.data_dir is not None, "the data folder is chosen before cases are looked for"
    root = Path(source.data_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder", "give the folder that holds the cases")
    cases: list[Case] = []
    visited = [root.resolve().parent]
    for parent, folders, files in os.walk(root, followlinks=True):
        visited += [Path(parent)] if any(name.lower().endswith(".csv") for name in files) else []
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))  # what killed writers leave
        if WRITTEN in files:  # predictions are neither cases nor references
            names = [name for name in names if not is_written_by_us(Path(parent) / name)]
        try:
            cases += resolve_folder(
                Path(parent), names, source.layout, root.resolve().name, source.slice_channel
            )
        except InputError as error:
            if errors is None:
                raise
            errors.append(error)
    if not cases and not errors:
        raise no_case(root, source.layout)
    cases.sort(key=lambda case: case.case_id)
    for case, following in itertools.pairwise(cases):
        if case.case_id == following.case_id:
            error = InputError(root, f"case {case.case_id} is there twice", "remove or rename one of the two")
            if errors is None:
                raise error
            errors.append(error)
    count = Counter(case.case_id for case in cases)
    protect_inputs(path for case in cases for path in case.files)
    unique = settle_conventions([case for case in cases if count[case.case_id] == 1])
    return map_patients(unique, find_sheets(visited), Path(source.mapping) if source.mapping else None)


def no_case(root: Path, layout: str) -> InputError:
    """Return the error of a folder without cases."""
    if layout != "auto":
        return InputError(
            root, f"no case in the layout {layout}", "--layout auto detects the layout by what is there"
        )
    return InputError(
        root,
        "no case found",
        "expected files such as <case>_flair.nii.gz (BraTS 2019 to 2021), <case>-t2f.nii.gz (2023, 2024), "
        "imagesTr/BRATS_001.nii.gz (MSD) or <case>_<z>.png",
    )


def find_cases(source: CaseSource, modalities: Sequence[str] = ("flair",)) -> list[Case]:
    """Return every case of a source, sorted by id, with its patient and its cohort's label convention.

    Each case must have the modalities asked for. Raises InputError where the folder is missing or holds no
    case, a case lacks a modality, or an id occurs twice.
    """
    cases = scan_cases(source)
    for case in cases:
        if missing := [name for name in modalities if name not in case.modalities]:
            raise missing_modality(case, missing[0])
    return cases


def find_cases_of_run(settings: Mapping[str, Any], data_dir: str | Path) -> list[Case]:
    """Return the cases below a folder as the run with these settings read them.

    Where it left bad cases out, those that cannot be told or lack a modality are left out again.
    """
    source = dataclasses.replace(from_plain(CaseSource, settings), data_dir=str(data_dir))
    needed = set(settings["modalities"])
    if settings.get("skip_bad"):
        return [case for case in scan_cases(source, errors=[]) if needed <= set(case.modalities)]
    return find_cases(source, settings["modalities"])


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
    """Return one case a NIfTI file, for a network of one modality; the file's name is the case's id."""
    if len(modalities) != 1:
        raise InputError(
            paths[0], f"the network needs {', '.join(modalities)}", "give the case's folder, not one file"
        )
    cases = []
    protect_inputs(paths)
    for path in paths:
        if not path.name.endswith((".nii", ".nii.gz")):
            raise InputError(path, "not a .nii or .nii.gz file", "give PNG and TIF cases as folders")
        named = resolve_folder(path.resolve().parent, [path.name], "auto", "files")
        if named and modalities[0] in named[0].modalities:
            own = {modalities[0]: (path,)}
            cases.append(dataclasses.replace(named[0], modalities=own, mask=()))
            continue
        case_id = re.sub(r"\.nii(\.gz)?$", "", path.name)
        layout = "brats2024" if re.fullmatch(LAYOUTS["brats2024"].ids, case_id) else "brats2021"
        layout = "brats2023" if re.fullmatch(r"BraTS-GLI-\d{5}-0\d\d", case_id) else layout
        convention = LAYOUTS[layout].convention
        own = {modalities[0]: (path,)}
        cases.append(Case(case_id, patient_of(case_id), "files", layout, convention, own, ()))
    return cases


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
        line += f", ET is {4 if usual == 'brats2023' else 3}" if group[0].convention != usual else ""
        log.info("%s%s", whose, line)
