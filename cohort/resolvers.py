"""How each data set names and places its files: one resolver per layout, which finds the cases of one folder.

LAYOUTS lists them; `cohort/layouts.py` walks the folders and decides between them.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

from cohort.cases import MODALITIES
from cohort.labels import convention_of_names
from cohort.pictures import is_stack
from runtime.command import Range
from runtime.errors import InputError
from runtime.files import describe_error, read_json
from runtime.plain import find_misfit

MSD_ORDER = ("flair", "t1", "t1ce", "t2")  # dataset.json of Task01: FLAIR, T1w, t1gd, T2w
# How files end, in any case of letters: the modality, or "seg" for the mask.
ENDINGS = {
    **{"flair": "flair", "t1": "t1", "t1ce": "t1ce", "t1gd": "t1ce", "t1c": "t1ce", "t2": "t2"},
    **{"seg": "seg", "segm": "seg", "tumor_segmentation": "seg"},
}
HYPHEN_ENDINGS = {"t2f": "flair", "t1n": "t1", "t2w": "t2", **ENDINGS}  # from BraTS 2023 on
ASTRAY = r"W\d+_.+_Segm\.nii(\.gz)?"  # the mask of BraTS 2020's case 355
NIFTI = r"\.nii(?:\.gz)?"
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "segmentations")
BIDS_MASKS = ("mask", "dseg", "seg")
# Of a BIDS derivative: pipelines and labels whose masks are of the head and its tissues, not of a tumour.
ANATOMY_PIPELINES = r"(?i)(fmri|smri|s)prep|(free|fast)surfer|synthseg|hd-?bet|samseg"
ANATOMY = r"(?i)_(?:desc|label)-(?:brain|head|skull|csf|gm|wm|aseg|aparc|tissue|ribbon|ventricle)"
NEW_IDS = (
    r"BraTS\d*[-_](?:GLI|SSA|MEN|MET|PED)-.+"  # named by hyphens from 2023 on, in copies also by underscores
)
BIDS_IDS = r"sub-[^_]+(?:_[a-zA-Z]+-[^_]+)*"
FOREIGN_IDS = rf"(?i:brats1[5-9])_|BraTS20_|{NEW_IDS}|UPENN-GBM-|UCSF-PDGM-|{BIDS_IDS}$"


LabelValue = Annotated[int, Range(0, 255)]


class NnunetFile(TypedDict, total=False):
    """What is read of a dataset.json; the first version has `modality`, and labels by value."""

    channel_names: dict[str, str]
    modality: dict[str, str]
    labels: dict[str, int | str | list[int]]


class Found(NamedTuple):
    """The files of one case as a resolver finds them."""

    case_id: str
    modalities: dict[str, tuple[Path, ...]]
    mask: tuple[Path, ...]
    volume_index: Mapping[str, int] = {}
    convention: str | None = None  # where the files say it, not the layout
    problem: InputError | None = None  # of a series of pictures, which may be no case at all


class Layout(NamedTuple):
    """One row of LAYOUTS."""

    title: str
    ids: str  # pattern of the case ids `auto` takes for this layout
    convention: str  # of its masks, unless they show another
    resolve: Callable[[Path, Sequence[str]], list[Found]]


def stem_of(name: str) -> str:
    """Return a file's name without .nii or .nii.gz, in any case of letters."""
    return re.sub(rf"{NIFTI}$", "", name, flags=re.IGNORECASE)


def is_nifti(name: str) -> bool:
    """Return whether a name ends as NIfTI files do, in any case of letters."""
    return name.lower().endswith((".nii", ".nii.gz"))


# ------------------------------------------------------------------------------------------------------------
# NIfTI: (folder, its file names, sorted) -> the cases whose files lie in it
# ------------------------------------------------------------------------------------------------------------


def _resolve_by_ending(
    folder: Path, names: Sequence[str], joints: str, endings: Mapping[str, str], ids: str = ".+"
) -> list[Found]:
    """Return the cases whose files are `<case><joint><ending>.nii[.gz]`, of the ids that match."""
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    for name in names:
        pattern = rf"(.+)[{joints}]({'|'.join(endings)}){NIFTI}"
        match = re.fullmatch(pattern, name, re.IGNORECASE)
        if not match or not re.fullmatch(ids, match[1]):
            continue
        case_id, modality = match[1], endings[match[2].lower()]
        if modality in files[case_id]:
            raise InputError(
                folder / name,
                f"the {modality} of {case_id} is there twice, also as {files[case_id][modality].name}",
                "remove one of the two",
            )
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
    """BraTS 2019 and 2021, UPENN-GBM, UCSF-PDGM: `<case>_{flair,t1,t1ce,t2,seg}.nii[.gz]` and their kin."""
    return _resolve_by_ending(
        folder, [name for name in names if not re.fullmatch(ASTRAY, name)], "_", ENDINGS
    )


def resolve_brats2020(folder: Path, names: Sequence[str]) -> list[Found]:
    """BraTS 2020: as 2021, but the mask of case 355 is named `W39_1998.09.19_Segm.nii`."""
    astray = [name for name in names if re.fullmatch(ASTRAY, name)]
    found = resolve_underscores(folder, names)
    if len(found) == 1 and not found[0].mask and len(astray) == 1:
        return [found[0]._replace(mask=(folder / astray[0],))]
    return found


def resolve_hyphens(folder: Path, names: Sequence[str]) -> list[Found]:
    """BraTS from 2023 on: `<case>-{t1n,t1c,t2w,t2f,seg}.nii[.gz]`, in some copies with underscores."""
    renamed = _resolve_by_ending(folder, names, "-_", HYPHEN_ENDINGS, NEW_IDS)
    return renamed + _resolve_by_ending(folder, names, "-", HYPHEN_ENDINGS, rf"(?!{NEW_IDS}).+")


def resolve_msd(folder: Path, names: Sequence[str]) -> list[Found]:
    """MSD Task01: `imagesTr/<case>.nii.gz` of four volumes, masks in `labelsTr`; imagesTs has none."""
    if folder.name not in ("imagesTr", "imagesTs"):
        return []
    found = []
    for name in filter(is_nifti, names):
        case_id = stem_of(name)
        mask = _mask_beside(folder, case_id) if folder.name == "imagesTr" else ()
        indices = {modality: index for index, modality in enumerate(MSD_ORDER)}
        found.append(Found(case_id, dict.fromkeys(MODALITIES, (folder / name,)), mask, indices))
    return found


def _mask_beside(folder: Path, case_id: str) -> tuple[Path, ...]:
    """Return the mask of a case of imagesTr or imagesTs in labelsTr or labelsTs."""
    labels = folder.with_name(folder.name.replace("images", "labels"))
    names = [f"{case_id}{ending}" for ending in (".nii.gz", ".nii", ".NII.GZ", ".NII", "_seg.nii.gz")]
    return tuple(labels / name for name in names if (labels / name).is_file())[:1]


def resolve_nnunet(folder: Path, names: Sequence[str]) -> list[Found]:
    """nnU-Net raw: `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz`; dataset.json names all.

    Channels that are no MRI sequence of ours are left out. Without a dataset.json, or with one of another
    program, nothing is found. Raises InputError where it cannot be read.
    """
    channels: dict[str, dict[int, Path]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(rf"(.+)_(\d{{4}}){NIFTI}", name, re.IGNORECASE):
            channels[match[1]][int(match[2])] = folder / name
    path = folder.parent / "dataset.json"
    if not folder.name.startswith("images") or not channels or not path.is_file():
        return []
    facts = read_json(path, "", "nnU-Net's dataset.json", NnunetFile)
    named = facts.get("channel_names") or facts.get("modality")
    labels = facts.get("labels")
    if named is None or labels is None:
        return []  # of another program
    try:
        modality_of = {int(number): modality_named(name) for number, name in named.items()}
        if all(str(key).isdigit() for key in labels):  # the first version: {"0": "background", ...}
            labels = {str(name): int(value) for value, name in labels.items()}
        if misfit := find_misfit(labels, dict[str, LabelValue | list[LabelValue]], "labels"):
            raise ValueError(misfit)
        convention = convention_of_names(labels, path)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            path, f"its channels or labels cannot be read ({describe_error(error)})", "correct it"
        ) from error
    if not set(modality_of.values()) & set(MODALITIES):
        raise InputError(path, f"names no channel of {', '.join(MODALITIES)}", "correct it or move it away")
    return [
        Found(
            case_id,
            {
                modality: (by_number[number],)
                for number, modality in sorted(modality_of.items())
                if number in by_number and modality in MODALITIES
            },
            _mask_beside(folder, case_id),
            convention=convention,
        )
        for case_id, by_number in sorted(channels.items())
    ]


def resolve_bids(folder: Path, names: Sequence[str]) -> list[Found]:
    """BIDS: `sub-X[_ses-Y][_...]_{FLAIR,T1w,T2w}.nii.gz`, masks `_mask`, `_dseg`, `_seg`, per folder.

    T1 after contrast is named so by its suffix or by `ce-` or `acq-`. Of several files for one modality the
    one with the fewest entities is taken. Masks of brain and tissues are none of the tumour.
    """
    files: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        match = re.fullmatch(rf"(sub-[^_]+(?:_ses-[^_]+)?)((?:_[a-zA-Z]+-[^_]+)*)_(\w+?){NIFTI}", name, re.I)
        if not match:
            continue
        case_id, entities, suffix = match[1], match[2], match[3]
        if suffix.lower().rpartition("_")[2] in BIDS_MASKS:
            in_pipeline = any(re.match(ANATOMY_PIPELINES, parent) for parent in folder.parts)
            if not in_pipeline and not re.search(ANATOMY, name):
                files[case_id]["seg"].append(folder / name)
            continue
        modality = modality_named(suffix)
        if modality == "t1" and re.search(
            r"_(?:ce-(?!none)|acq-(?:ce|gd|gad|post|contrast))", entities, re.I
        ):
            modality = "t1ce"
        if modality in MODALITIES and "_" not in suffix:
            files[case_id][modality].append(folder / name)
    return [
        Found(
            case_id,
            {name: (_plainest(found[name]),) for name in MODALITIES if name in found},
            (choose_mask(found["seg"]),) if "seg" in found else (),
        )
        for case_id, found in sorted(files.items())
    ]


def _plainest(paths: Sequence[Path]) -> Path:
    return min(paths, key=lambda path: (path.name.count("-"), path.name))


def choose_mask(paths: Sequence[Path]) -> Path:
    """Return the tumour's mask of several; raises InputError where the names do not say which it is."""
    if len(paths) == 1:
        return paths[0]
    of_tumour = [path for path in paths if re.search(r"tumou?r|lesion|glioma", path.name, re.IGNORECASE)]
    if len(of_tumour) != 1:
        raise InputError(
            paths[0],
            f"is one of {len(paths)} masks of its case, another is {paths[1]}",
            "leave the tumour's alone or name it desc-tumor",
        )
    return of_tumour[0]


# ------------------------------------------------------------------------------------------------------------
# What names say
# ------------------------------------------------------------------------------------------------------------

MASK_WORDS = r"(?:seg|segm|dseg|segmentations?|\w*mask|masks|labels?|labelmap|roi|gtv?|truth|groundtruth)"
OTHER_WORDS = r"(?:dwi|adc|swi|dti|asl|bold|t2star\w*|t2s|t[12]map|t1rho|pdw|cbv|cbf|pet|probseg)"
TARGET_WORDS = ("to", "in", "on", "onto", "2")  # t1_to_flair is a T1


def words_of(name: str) -> list[str]:
    """Return the words of a file's name, in small letters, without the entity that says a space."""
    stem = re.sub(r"_(?:space|res)-[^_]+", "", stem_of(name), flags=re.IGNORECASE)
    return [word for word in re.split(r"[^a-z0-9]+", stem.lower()) if word]


def modality_named(name: str) -> str | None:
    """Return the modality a name says, "seg" for a mask, "other" for a sequence that is none of ours.

    None where it says nothing. A file moved into the space of another modality is what it was.
    """
    words = words_of(name)
    masks = [index for index, word in enumerate(words) if re.fullmatch(MASK_WORDS, word)]
    named = [(index, kind) for index, word in enumerate(words) if (kind := _modality_of_word(word))]
    if masks and (not named or masks[-1] >= named[-1][0] - 1):  # else a part of the case's id
        return "seg"
    for index, _ in named:
        if index + 1 < len(words) and words[index + 1] in TARGET_WORDS:
            words = words[: index + 1]
            named = [entry for entry in named if entry[0] <= index]
            break
    if any(kind == "flair" for _, kind in named) and named[-1][1] in ("flair", "t2"):
        return "flair"  # T2 FLAIR
    if not named:
        return None
    index, last = named[-1]
    if last != "t1" or {"pre", "no", "non", "without", "native", "unenhanced"} & set(words):
        return last
    with_contrast = r"(?:ce|gd|gad\w*|post\w*|contrast\w*|c)"
    is_enhanced = any(re.fullmatch(with_contrast, word) for word in words[index + 1 : index + 3])
    before = re.search(r"(?:^|_)(?:(?:ce|acq)-(?!none)|post|contrast|gd|gad)", name, re.IGNORECASE)
    return (
        "t1ce"
        if is_enhanced or (before and not re.search(r"acq-(?!ce|gd|gad|post|contrast)", name))
        else last
    )


def _modality_of_word(word: str) -> str | None:
    if "flair" in word or word == "t2f":
        return "flair"
    if re.fullmatch(OTHER_WORDS, word):
        return "other"
    if re.fullmatch(r"t1(?:w|wi)?(?:c|ce|kc?m|\w*gd|\w*gad\w*|\w*post\w*|\w*contrast\w*)", word):
        return "t1ce"
    if re.fullmatch(r"t1(?:[a-z]\w*)?|mprage|bravo", word):
        return "t1"
    if re.fullmatch(r"t2(?:[a-z]\w*)?", word):
        return "t2"
    return None


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------


def resolve_stacks(folder: Path, names: Sequence[str]) -> tuple[list[Found], list[str]]:
    """Return (a case for each multi-page TIF `<case>.tif` with its `<case>_mask.tif`, the names left over).

    A multi-page `<case>_<z>.tif` whose neighbours have one page each is left over: it is no case of its own.
    """
    stems = {name: Path(name).stem for name in names if re.search(r"\.tiff?$", name, re.IGNORECASE)}
    masks = {stem[:-5]: name for name, stem in stems.items() if stem.lower().endswith("_mask")}
    stacks = [name for name in stems if name not in masks.values() and is_stack(folder / name)]
    numbered = (re.fullmatch(r"(.+)_\d+\.(png|tiff?)", name, re.IGNORECASE) for name in {*names} - {*stacks})
    series = {match[1] for match in numbered if match}
    found, used = [], set()
    for name in stacks:
        stem = stems[name]
        if re.sub(r"_\d+$", "", stem) in series:
            continue
        mask = (masks[stem],) if stem in masks else ()
        found.append(Found(stem, {"flair": (folder / name,)}, tuple(folder / own for own in mask)))
        used |= {name, *mask}
    return found, [name for name in names if name not in used]


def resolve_slices(folder: Path, names: Sequence[str]) -> list[Found]:
    """PNG and TIF slices: `<case>_<z>.png|tif` and `<case>_<z>_mask.*`, z sorted as a number.

    In `images/`, or a folder of a case in it, slices may be named by the number alone, and the masks lie in
    `masks/` beside it under the same names. Grey slices are FLAIR. Of RGB slices the chosen channel is FLAIR;
    `layouts.offer_channels` adds the others. A multi-page TIF is a whole case, with `<case>_mask.tif`.
    """
    if _counterpart(folder, MASK_FOLDERS, IMAGE_FOLDERS):
        return []  # the masks of pictures beside
    stacks, names = resolve_stacks(folder, names)
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    masks: dict[str, dict[int, Path]] = defaultdict(dict)
    problem_of: dict[str, InputError] = {}
    mask_folder = _counterpart(folder, IMAGE_FOLDERS, MASK_FOLDERS)
    own_name = folder.parent.name if folder.name.lower() in IMAGE_FOLDERS else folder.name
    pictures = [(folder / name, False) for name in names]
    if mask_folder:
        pictures += [(path, True) for path in sorted(mask_folder.iterdir())]
    for path, is_mask in pictures:
        number = r"(?:(?P<case>.+?)_)?(?P<z>\d+)" if mask_folder else r"(?P<case>.+)_(?P<z>\d+)"
        ending = r"(?P<mask>_mask|_seg)?" if is_mask else r"(?P<mask>_mask)?"
        match = re.fullmatch(rf"{number}{ending}\.(?:png|tiff?)", path.name, re.IGNORECASE)
        if not match or path.name.startswith("."):
            continue
        case_id, z = match["case"] or own_name, int(match["z"])
        chosen = (masks if match["mask"] or is_mask else slices)[case_id]
        if z in chosen:
            problem = InputError(
                path, f"slice {z} is there twice, also as {chosen[z].name}", "remove one of the two files"
            )
            problem_of.setdefault(case_id, problem)
        chosen[z] = path
    found = []
    for case_id, by_number in sorted(slices.items()):
        own_masks = masks.get(case_id, {})
        problem = problem_of.get(case_id) or _unmatched(by_number, own_masks)
        mask = tuple(own_masks.get(z, by_number[z]) for z in sorted(by_number)) if own_masks else ()
        series = {"flair": tuple(by_number[z] for z in sorted(by_number))}
        found.append(Found(case_id, series, mask, problem=problem))
    return found + stacks


def _counterpart(folder: Path, own: Sequence[str], others: Sequence[str]) -> Path | None:
    """Return the folder that has, in one of `others`, the place that a folder has in one of `own`."""
    for level, below in ((folder, ""), (folder.parent, folder.name)):
        if level.name.lower() in own:
            beside = [level.with_name(style(name)) for name in others for style in (str.lower, str.title)]
            return next((path / below for path in beside if (path / below).is_dir()), None)
    return None


def _unmatched(slices: Mapping[int, Path], masks: Mapping[int, Path]) -> InputError | None:
    """Return the error of a slice without mask, where others of its case have one, or the other way round."""
    if masks and (unmasked := set(slices) - set(masks)):
        return InputError(
            slices[min(unmasked)], "this slice has no _mask file though others of its case have"
        )
    if orphans := set(masks) - set(slices):
        return InputError(masks[min(orphans)], "this mask has no slice", "add it or remove the mask")
    return None


def find_gap(paths: Sequence[Path]) -> int | None:
    """Return the first number missing in a series of slices, None where there is none."""
    numbers = [int(match[1]) for path in paths if (match := re.search(r"(\d+)$", path.stem))]
    return next((one + 1 for one, following in itertools.pairwise(numbers) if following > one + 1), None)


# Among layouts of like file names an id belongs to one. BraTS 2024 GLI counts its timepoints from 100, 2023
# from 0. PED (children) and MET (metastases, with cavities) have labels of their own.
LAYOUTS: dict[str, Layout] = {
    "brats2019": Layout("BraTS 2019", r"(?i:brats1[5-9])_.+", "brats", resolve_underscores),
    "brats2020": Layout("BraTS 2020", r"BraTS20_.+", "brats", resolve_brats2020),
    "brats2021": Layout("BraTS 2021", rf"(?!{FOREIGN_IDS}).+", "brats", resolve_underscores),
    "brats2023": Layout(
        "BraTS 2023",
        r"(?!BraTS\d*[-_](?:PED|MET)-|BraTS-GLI-\d{5}-[1-9]\d\d).+",
        "brats2023",
        resolve_hyphens,
    ),
    "brats2024": Layout("BraTS 2024", r"BraTS-GLI-\d{5}-[1-9]\d\d", "brats2024", resolve_hyphens),
    "brats-met": Layout("BraTS-MET", r"BraTS\d*[-_]MET-.+", "brats2024", resolve_hyphens),
    "brats-ped": Layout("BraTS-PED", r"BraTS\d*[-_]PED-.+", "brats-ped", resolve_hyphens),
    "upenn": Layout("UPENN-GBM", r"UPENN-GBM-.+", "brats", resolve_underscores),
    "ucsf": Layout("UCSF-PDGM", r"UCSF-PDGM-.+", "brats", resolve_underscores),
    "bids": Layout("BIDS", r"sub-.+", "brats", resolve_bids),
    "nnunet": Layout("nnU-Net raw", r".+", "brats2023", resolve_nnunet),
    "msd": Layout("MSD Task01", r"BRATS_\d+", "msd", resolve_msd),
    "slices": Layout("PNG/TIF slices", r".+", "binary", resolve_slices),
}
