"""From disk to cases and volumes, and back: layouts, label conventions, orientation, reading and writing.

nibabel's (X, Y, Z) exists only in this file. Everywhere else a volume is (C, D, H, W) and labels are (D, H,
W), oriented LPS: D runs to superior, H to posterior, W to the patient's left, as BraTS files have it.
"""

import gzip
import itertools
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from utils_v2 import PHANTOM_DESCRIPTION, InputError, write_atomically

MODALITIES = ("flair", "t1", "t1ce", "t2")
CANONICAL = axcodes2ornt("LPS")
AFFINE_TOLERANCE_MM = 0.01  # the files of a case may differ by rounding
NIFTI_ERRORS = (
    nib.filebasedimages.ImageFileError,
    HeaderDataError,
    EOFError,
    zlib.error,
    OSError,
    ValueError,
)
SLICES_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # PNG and TIF carry no geometry: 1 mm, LPS, stated as unknown

# Which file values make up each region. TC and ET lie inside WT; a convention without them has binary masks.
LABEL_CONVENTIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "brats": {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    "binary": {"WT": (1,)},
}
# Written back from the largest region to the smallest, so that each reads as BraTS means it.
OUTPUT_LABELS = {"WT": 2, "TC": 1, "ET": 4}


@dataclass(frozen=True)
class Case:
    """One scan of one patient: where its files are and how to read them."""

    case_id: str
    patient_id: str
    cohort: str
    layout: str  # a key of LAYOUTS
    convention: str  # a key of LABEL_CONVENTIONS
    modalities: dict[str, tuple[Path, ...]]  # one NIfTI file, or the slices from first to last
    mask: tuple[Path, ...]  # empty where there is no reference
    slice_channel: int = 1  # which channel of RGB slices is FLAIR


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory, on its native grid, in canonical orientation, with the intensities of the files."""

    volume: np.ndarray  # (C, D, H, W) float32
    labels: np.ndarray | None  # (D, H, W) uint8, values of the case's label convention
    affine: np.ndarray  # (4, 4), canonical voxel (X, Y, Z) to mm
    spacing_mm: tuple[float, float, float]  # (D, H, W)


# ------------------------------------------------------------------------------------------------------------
# Finding cases
# ------------------------------------------------------------------------------------------------------------


def patient_of(case_id: str) -> str:
    """Return the patient a case id names: TCGA ids without the date, BraTS-GLI ids without the timepoint."""
    for pattern in (r"(TCGA_\w{2}_\w{4})_\d{8}", r"(BraTS-GLI-\d{5})-\d{3}"):
        if match := re.fullmatch(pattern, case_id):
            return match[1]
    return case_id


def resolve_brats2021(folder: Path, names: Sequence[str], cohort: str, slice_channel: int) -> list[Case]:  # noqa: ARG001
    """Return the cases whose `<case>_<modality>.nii[.gz]` files lie in this folder."""
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(r"(.+)_(flair|t1|t1ce|t2|seg)\.nii(\.gz)?", name):
            if match[2] in files[match[1]]:
                raise InputError(f"{folder / name}: is there as .nii and as .nii.gz; remove one of the two.")
            files[match[1]][match[2]] = folder / name
    return [
        Case(
            case_id=case_id,
            patient_id=patient_of(case_id),
            cohort=cohort,
            layout="brats2021",
            convention="brats",
            modalities={name: (found[name],) for name in MODALITIES if name in found},
            mask=(found["seg"],) if "seg" in found else (),
        )
        for case_id, found in sorted(files.items())
    ]


def resolve_slices(folder: Path, names: Sequence[str], cohort: str, slice_channel: int) -> list[Case]:
    """Return the cases whose `<case>_<z>.png|tif` slices lie in this folder, z sorted as a number.

    Grey slices are FLAIR. Of RGB slices the chosen channel is FLAIR (kaggle_3m: 0 = T1, 1 = FLAIR, 2 = T1ce).
    """
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    masks: dict[str, dict[int, Path]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(r"(.+)_(\d+)(_mask)?\.(png|tiff?)", name, re.IGNORECASE):
            chosen = masks if match[3] else slices
            if int(match[2]) in chosen[match[1]]:
                raise InputError(
                    f"{folder / name}: slice {int(match[2])} is there twice; remove one of the two files."
                )
            chosen[match[1]][int(match[2])] = folder / name
    cases = []
    for case_id, found in sorted(slices.items()):
        numbers = sorted(found)
        if missing := set(range(numbers[0], numbers[-1])) - set(numbers):
            raise InputError(
                f"{folder}: slice {min(missing)} of {case_id} is missing; neighbours must be adjacent."
            )
        if masks[case_id] and (unmasked := set(numbers) - set(masks[case_id])):
            raise InputError(
                f"{found[min(unmasked)]}: this slice has no _mask file though others of its case have."
            )
        if orphans := set(masks[case_id]) - set(numbers):
            raise InputError(
                f"{masks[case_id][min(orphans)]}: this mask has no slice; add it or remove the mask."
            )
        cases.append(
            Case(
                case_id=case_id,
                patient_id=patient_of(case_id),
                cohort=cohort,
                layout="slices",
                convention="binary",
                modalities={"flair": tuple(found[z] for z in numbers)},
                mask=tuple(masks[case_id][z] for z in numbers) if masks[case_id] else (),
                slice_channel=slice_channel,
            )
        )
    return cases


LAYOUTS: dict[str, Callable[[Path, Sequence[str], str, int], list[Case]]] = {
    "brats2021": resolve_brats2021,
    "slices": resolve_slices,
}


def find_cases(
    data_dir: str | Path, modalities: Sequence[str] = ("flair",), slice_channel: int = 1
) -> list[Case]:
    """Return every case below a folder, sorted by id; layouts are told by the file names (LAYOUTS).

    `modalities` are the ones each case must have. Raises InputError where the folder is missing or holds no
    case, a case lacks a modality, or an id occurs twice.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds the cases.")
    cases: list[Case] = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))  # what killed writers leave
        for resolve in LAYOUTS.values():
            cases += resolve(Path(parent), names, root.resolve().name, slice_channel)
    if not cases:
        raise InputError(
            f"{root}: no case found; expected <case>_flair.nii.gz (BraTS 2021) or <case>_<z>.png|tif."
        )
    cases.sort(key=lambda case: case.case_id)
    for case, following in itertools.pairwise(cases):
        if case.case_id == following.case_id:
            raise InputError(f"{root}: case {case.case_id} is there twice; remove or rename one of the two.")
    for case in cases:
        if missing := [name for name in modalities if name not in case.modalities]:
            folder = next(iter((*case.modalities.values(), case.mask)))[0].parent
            raise InputError(
                f"{folder}: case {case.case_id} has no {missing[0]} file; add it or leave the case out."
            )
    return cases


def cases_of_files(paths: Sequence[Path], modalities: Sequence[str]) -> list[Case]:
    """Return one case a NIfTI file, for a network of one modality; the file's name is the case's id."""
    if len(modalities) != 1:
        raise InputError(
            f"{paths[0]}: the network needs {', '.join(modalities)}; give the case's folder, not one file."
        )
    cases = []
    for path in paths:
        if not path.name.endswith((".nii", ".nii.gz")):
            raise InputError(f"{path}: not a .nii or .nii.gz file; give PNG and TIF cases as folders.")
        case_id = re.sub(rf"(_{modalities[0]})?\.nii(\.gz)?$", "", path.name)
        case = Case(case_id, patient_of(case_id), "files", "brats2021", "brats", {modalities[0]: (path,)}, ())
        cases.append(case)
    return cases


def with_reference(cases: Sequence[Case], data_dir: str | Path) -> list[Case]:
    """Return the cases that have a mask; raises InputError where none has."""
    kept = [case for case in cases if case.mask]
    if not kept:
        raise InputError(
            f"{data_dir}: none of the {len(cases)} cases has a mask, and training and audit need them."
        )
    return kept


def is_phantom(case: Case) -> bool:
    """Tell whether a case was made by make_phantom_v2.py, by the description in its NIfTI header."""
    path = next(iter(case.modalities.values()))[0]
    if case.layout == "slices":
        return False
    return bytes(read_nifti_header(path).header["descrip"]).rstrip(b"\0") == PHANTOM_DESCRIPTION.encode()


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


def read_nifti_header(path: Path) -> nib.Nifti1Image:
    """Open a NIfTI file for its header and affine; raises InputError where it is missing or no NIfTI."""
    try:
        return nib.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except NIFTI_ERRORS as error:
        raise InputError(
            f"{path}: not a readable NIfTI file ({one_line(error)}); download it again."
        ) from error


def read_nifti_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (D, H, W), affine (4, 4) of its canonical X, Y, Z), whatever the file's orientation.

    A .gz file is read to its end, so that its checksum is verified.
    """
    is_nifti2 = isinstance(read_nifti_header(path), nib.Nifti2Image)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        image = (nib.Nifti2Image if is_nifti2 else nib.Nifti1Image).from_bytes(content)
        array = np.asanyarray(image.dataobj)
        turn = ornt_transform(io_orientation(image.affine), CANONICAL)
    except NIFTI_ERRORS as error:
        raise InputError(f"{path}: truncated or damaged ({one_line(error)}); download it again.") from error
    if np.isnan(turn).any():
        raise InputError(f"{path}: its affine leaves an axis without direction; repair the header.")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 or array.dtype.fields:
        raise InputError(f"{path}: has shape {array.shape} of {array.dtype}; one grey volume is needed.")
    affine = image.affine @ inv_ornt_aff(turn, array.shape)
    return apply_orientation(array, turn).transpose(2, 1, 0), affine


def one_line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


def read_slices(paths: Sequence[Path], channel: int) -> np.ndarray:
    """Return the slices of one case as (D, H, W) of their own integer type; of RGB files one channel."""
    slices = []
    for path in paths:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise InputError(f"{path}: not a readable picture; export it again.")
        if pixels.ndim == 3:
            if not 0 <= channel < min(pixels.shape[2], 3):
                raise InputError(f"{path}: has no channel {channel}; --slice-channel takes 0, 1 or 2.")
            pixels = pixels[..., 2 - channel]  # OpenCV reads BGR
        if slices and pixels.shape != slices[0].shape:
            raise InputError(f"{path}: has shape {pixels.shape}, the case's first slice {slices[0].shape}.")
        slices.append(pixels)
    return np.stack(slices)


def read_labels(case: Case, affine: np.ndarray) -> np.ndarray:
    """Return a case's reference labels (D, H, W) uint8; raises InputError on an unknown value."""
    if case.layout == "slices":
        labels = read_slices(case.mask, case.slice_channel)
        values = np.unique(labels)
        labels = np.where(labels == 255, 1, labels) if values[-1] == 255 else labels
    else:
        labels, mask_affine = read_nifti_volume(case.mask[0])
        check_affine(case.mask[0], mask_affine, affine)
    known = {0, *LABEL_CONVENTIONS[case.convention]["WT"]}
    if unknown := sorted({float(value) for value in np.unique(labels)} - known):
        raise InputError(
            f"{_file_with_value(case, unknown[0])}: unknown label {unknown[0]:g}; {case.convention} masks "
            f"hold {sorted(known)}{' or 255' if case.layout == 'slices' else ''} only."
        )
    return labels.astype(np.uint8)


def check_affine(path: Path, affine: np.ndarray, expected: np.ndarray) -> None:
    """Raise InputError where a file lies elsewhere in space than the first file of its case."""
    if not np.allclose(affine, expected, atol=AFFINE_TOLERANCE_MM):
        raise InputError(
            f"{path}: its affine differs from that of the case's first modality; register the files."
        )


def _file_with_value(case: Case, value: float) -> Path:
    if case.layout == "slices":
        return next(path for path in case.mask if (read_slices([path], case.slice_channel) == value).any())
    return case.mask[0]


def load_case(case: Case, modalities: Sequence[str] = ("flair",)) -> LoadedCase:
    """Read a case's modalities, in the order given, and its labels where it has a mask.

    Raises InputError naming the file where one is unreadable, differs in shape, or holds an unknown label.
    The spacing of PNG and TIF slices is unknown and stated as 1 mm.
    """
    volumes, affine = [], SLICES_AFFINE
    for name in modalities:
        paths = case.modalities[name]
        if case.layout == "slices":
            array = read_slices(paths, case.slice_channel)
        else:
            array, own_affine = read_nifti_volume(paths[0])
            affine = affine if volumes else own_affine
            check_affine(paths[0], own_affine, affine)
        if volumes and array.shape != volumes[0].shape:
            raise InputError(
                f"{paths[0]}: has shape {array.shape}, the case's {modalities[0]} {volumes[0].shape}."
            )
        if not np.isfinite(array).all():
            raise InputError(f"{paths[0]}: holds NaN or infinite values; repair it or leave the case out.")
        volumes.append(array.astype(np.float32))
    labels = read_labels(case, affine) if case.mask else None
    if labels is not None and labels.shape != volumes[0].shape:
        raise InputError(
            f"{case.mask[0]}: the mask has shape {labels.shape}, the {modalities[0]} {volumes[0].shape}."
        )
    spacing_mm = tuple(float(size) for size in nib.affines.voxel_sizes(affine)[::-1])
    return LoadedCase(np.stack(volumes), labels, affine, spacing_mm)


def regions_from_labels(labels: np.ndarray, convention: str, regions: Sequence[str]) -> np.ndarray:
    """Return bool masks (R, D, H, W) of the named regions; InputError where there is none of one."""
    table = LABEL_CONVENTIONS[convention]
    if missing := [region for region in regions if region not in table]:
        raise InputError(f"--regions {missing[0]}: {convention} masks hold only {', '.join(table)}.")
    return np.stack([np.isin(labels, table[region]) for region in regions])


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------


def labels_from_regions(masks: np.ndarray, regions: Sequence[str]) -> np.ndarray:
    """Return BraTS labels (D, H, W) uint8 of region masks (R, D, H, W).

    ET becomes 4, the rest of TC 1, the rest of WT 2; a network of WT alone says nothing of the core and
    writes 2.
    """
    labels = np.zeros(masks.shape[1:], np.uint8)
    for region, value in OUTPUT_LABELS.items():
        if region in regions:
            labels[masks[list(regions).index(region)]] = value
    return labels


def save_labels(labels: np.ndarray, case: Case, output_dir: Path) -> Path:
    """Write predicted labels (D, H, W) beside a case's geometry and return the path.

    NIfTI cases: `<case>_seg.nii.gz`, uint8, in the orientation, affine and header of the case's first
    modality. Slice cases: a folder `<case>/` of `<case>_<z>_mask.png`, 0 and 255.
    """
    paths = next(iter(case.modalities.values()))
    if case.layout == "slices":
        folder = output_dir / case.case_id
        for path, pixels in zip(paths, labels, strict=True):
            binary = (pixels > 0).astype(np.uint8) * 255
            write_atomically(
                folder / f"{path.stem}_mask.png", lambda target, b=binary: _write_picture(target, b)
            )
        return folder
    image = read_nifti_header(paths[0])
    back = ornt_transform(CANONICAL, io_orientation(image.affine))
    array = apply_orientation(labels.transpose(2, 1, 0), back).astype(np.uint8)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"] = 0, 0  # the input's display window does not fit labels
    output = output_dir / f"{case.case_id}_seg.nii.gz"
    write_atomically(output, lambda target: nib.save(type(image)(array, image.affine, header), target))
    return output


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path}: the picture could not be written")
