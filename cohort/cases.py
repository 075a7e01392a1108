"""From a case's files to volumes and labels, and back: label conventions, orientation, reading and writing.

nibabel's (X, Y, Z) exists only in this file. Everywhere else a volume is (C, D, H, W) and labels are (D, H,
W), oriented LPS: D runs to superior, H to posterior, W to the patient's left, as BraTS files have it.
"""

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import cv2
import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from cohort.labels import NO_REGION, round_labels, values_of
from runtime.command import Distinct
from runtime.errors import InputError
from runtime.files import write_atomically

MODALITIES = ("flair", "t1", "t1ce", "t2")
Modality = Literal["flair", "t1", "t1ce", "t2"]
Modalities = Annotated[tuple[Modality, ...], Distinct()]  # as a setting
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
INT16_SEAM = 2**14  # int16 files with voxels beyond it on both sides have wrapped around


@dataclass(frozen=True)
class Case:
    """One scan of one patient: where its files are and how to read them."""

    case_id: str
    patient_id: str
    cohort: str
    layout: str  # a key of layouts.LAYOUTS
    convention: str  # a key of LABEL_CONVENTIONS, or one that `values_of` reads
    modalities: dict[str, tuple[Path, ...]]  # one NIfTI file, or the slices from first to last
    mask: tuple[Path, ...]  # empty where there is no reference
    slice_channel: int = 1  # which channel of RGB slices is FLAIR
    volume_index: Mapping[str, int] = field(default_factory=dict)  # per modality, in files of four axes
    aliases: tuple[str, ...] = ()  # other ids of this scan or patient, by a mapping sheet


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory, on its native grid, in canonical orientation, with the intensities of the files."""

    volume: np.ndarray  # (C, D, H, W) float32
    labels: np.ndarray | None  # (D, H, W) uint8, values of the case's label convention
    affine: np.ndarray  # (4, 4), canonical voxel (X, Y, Z) to mm
    spacing_mm: tuple[float, float, float]  # (D, H, W)


def with_reference(cases: Sequence[Case], data_dir: str | Path) -> list[Case]:
    """Return the cases that have a mask; raises InputError where none has."""
    kept = [case for case in cases if case.mask]
    if not kept:
        raise InputError(
            data_dir, f"none of the {len(cases)} cases has a mask, and training and audit need them"
        )
    return kept


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


def read_nifti_header(path: Path) -> nib.Nifti1Image:
    """Open a NIfTI file for its header and affine; raises InputError where it is missing or no NIfTI."""
    try:
        return nib.load(path)
    except FileNotFoundError:
        raise InputError(path, "no such file") from None
    except NIFTI_ERRORS as error:
        raise InputError(
            path, f"not a readable NIfTI file ({one_line(error)})", "download it again"
        ) from error


def decode_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (X, Y, Z) or (X, Y, Z, V), affine (4, 4)) as they lie in the file.

    A .gz file is read to its end, so that its checksum is verified. Intensities of int16 files that wrapped
    around at 32767 are put right.
    """
    is_nifti2 = isinstance(read_nifti_header(path), nib.Nifti2Image)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        image = (nib.Nifti2Image if is_nifti2 else nib.Nifti1Image).from_bytes(content)
        array = np.asanyarray(image.dataobj)
    except NIFTI_ERRORS as error:
        raise InputError(path, f"truncated or damaged ({one_line(error)})", "download it again") from error
    return unwrap_int16(array), image.affine


def unwrap_int16(array: np.ndarray) -> np.ndarray:
    """Return an array whose intensities past 32767 were stored as negative ones with those restored.

    MRI magnitudes are not negative and interpolation undershoots by little, so int16 voxels below -16384
    beside others above 16384 are such; the brightest tissue would be the darkest. Where they are a tenth of
    the file they are its background. Other arrays come back as they are, slight negatives and voxels cut off
    at 32767 included: median and quartiles do not mind them.
    """
    if array.dtype.newbyteorder("=") != np.int16 or array.size == 0 or array.max() <= INT16_SEAM:
        return array
    wrapped = array < -INT16_SEAM
    if not 0 < wrapped.mean() < 0.1:
        return array
    return np.where(wrapped, array.astype(np.int32) + 2**16, array)


def orient_volume(
    path: Path, array: np.ndarray, affine: np.ndarray, index: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (D, H, W), affine (4, 4) of its canonical X, Y, Z) of what `decode_nifti` read.

    `index` chooses a volume of a file of four axes; None takes files of one volume only.
    """
    try:
        turn = ornt_transform(io_orientation(affine), CANONICAL)
    except NIFTI_ERRORS as error:
        raise InputError(path, f"truncated or damaged ({one_line(error)})", "download it again") from error
    if np.isnan(turn).any():
        raise InputError(path, "its affine leaves an axis without direction", "repair the header")
    if index is not None:
        if array.ndim != 4 or index >= array.shape[3]:
            raise InputError(path, f"has shape {array.shape}", "an MSD file holds FLAIR, T1, T1ce and T2")
        array = array[..., index]
    elif array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 or array.dtype.fields:
        raise InputError(path, f"has shape {array.shape} of {array.dtype}", "one grey volume is needed")
    canonical_affine = affine @ inv_ornt_aff(turn, array.shape)
    return apply_orientation(array, turn).transpose(2, 1, 0), canonical_affine


def read_nifti_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (D, H, W), affine (4, 4) of its canonical X, Y, Z), whatever the file's orientation."""
    return orient_volume(path, *decode_nifti(path))


def read_modality(
    case: Case, name: str, decoded: dict[Path, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (D, H, W) of the file's own type, canonical affine (4, 4)) of one modality.

    `decoded` keeps what `decode_nifti` read for the case's next modality: the four of MSD share one file.
    """
    paths = case.modalities[name]
    if case.layout == "slices":
        return read_slices(paths, case.slice_channel), SLICES_AFFINE
    if paths[0] not in decoded:
        decoded.clear()
        decoded[paths[0]] = decode_nifti(paths[0])
    return orient_volume(paths[0], *decoded[paths[0]], case.volume_index.get(name))


def one_line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


def read_slices(paths: Sequence[Path], channel: int | None) -> np.ndarray:
    """Return the slices of one case as (D, H, W) of their own integer type.

    Of RGB files one channel; with None, for masks, whatever their colour, the brightest.
    """
    slices = []
    for path in paths:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise InputError(path, "not a readable picture", "export it again")
        if pixels.ndim == 3 and channel is None:
            pixels = pixels[..., :3].max(-1)
        elif pixels.ndim == 3:
            if not 0 <= channel < min(pixels.shape[2], 3):
                raise InputError(path, f"has no channel {channel}", "--slice-channel takes 0, 1 or 2")
            pixels = pixels[..., 2 - channel]  # OpenCV reads BGR
        if slices and pixels.shape != slices[0].shape:
            raise InputError(path, f"has shape {pixels.shape}, the case's first slice {slices[0].shape}")
        slices.append(pixels)
    return np.stack(slices)


def read_labels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return (reference labels (D, H, W) uint8, their canonical affine (4, 4)) of a case with a mask.

    Raises InputError on a value the case's convention does not have; float masks may miss it by 1e-3.
    """
    if case.layout == "slices":
        labels, affine = read_slices(case.mask, None), SLICES_AFFINE
    else:
        labels, affine = read_nifti_volume(case.mask[0])
        labels = round_labels(labels)
    if case.convention == "binary":
        labels = np.where(labels == 255, 1, labels) if labels.max(initial=0) == 255 else labels
    known = {0, *values_of(case.convention)["WT"], *NO_REGION.get(case.convention, ())}
    if unknown := sorted({float(value) for value in np.unique(labels)} - known):
        hint = ""
        if case.convention == "brats2023" and unknown == [4.0]:
            hint = (
                "; where 4 is the resection cavity, pass --layout brats2024, of children --layout brats-ped"
            )
        raise InputError(
            _file_with_value(case, unknown[0]),
            f"unknown label {unknown[0]:g}",
            f"{case.convention} masks hold {sorted(known)}{' or 255' if case.convention == 'binary' else ''} "
            f"only{hint}",
        )
    return labels.astype(np.uint8), affine


def check_affine(path: Path, affine: np.ndarray, expected: np.ndarray) -> None:
    """Raise InputError where a file lies elsewhere in space than the first file of its case."""
    if not np.allclose(affine, expected, atol=AFFINE_TOLERANCE_MM):
        raise InputError(
            path, "its affine differs from that of the case's first modality", "register the files"
        )


def _file_with_value(case: Case, value: float) -> Path:
    if case.layout == "slices":
        return next(path for path in case.mask if (read_slices([path], None) == value).any())
    return case.mask[0]


def load_case(case: Case, modalities: Sequence[str] = ("flair",)) -> LoadedCase:
    """Read a case's modalities, in the order given, and its labels where it has a mask.

    Raises InputError naming the file where one is unreadable, differs in shape, or holds an unknown label.
    The spacing of PNG and TIF slices is unknown and stated as 1 mm.
    """
    volumes, affine = [], SLICES_AFFINE
    decoded: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    for name in modalities:
        path = case.modalities[name][0]
        array, own_affine = read_modality(case, name, decoded)
        affine = affine if volumes else own_affine
        check_affine(path, own_affine, affine)
        if volumes and array.shape != volumes[0].shape:
            raise InputError(path, f"has shape {array.shape}, the case's {modalities[0]} {volumes[0].shape}")
        if not np.isfinite(array).all():
            raise InputError(path, "holds NaN or infinite values", "repair it or leave the case out")
        volumes.append(array.astype(np.float32))
    labels = None
    if case.mask:
        labels, mask_affine = read_labels(case)
        check_affine(case.mask[0], mask_affine, affine)
    if labels is not None and labels.shape != volumes[0].shape:
        raise InputError(
            case.mask[0], f"the mask has shape {labels.shape}, the {modalities[0]} {volumes[0].shape}"
        )
    spacing_mm = tuple(float(size) for size in nib.affines.voxel_sizes(affine)[::-1])
    return LoadedCase(np.stack(volumes), labels, affine, spacing_mm)


def save_labels(labels: np.ndarray, case: Case, output_dir: Path) -> Path:
    """Write predicted labels (D, H, W) beside a case's geometry and return the path.

    NIfTI cases: `<case>_seg.nii.gz` (`<case>-seg.nii.gz` from BraTS 2023 on, `<case>.nii.gz` for nnU-Net,
    by which the layout reads them back), uint8, in the orientation, affine and header of the case's first
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
    ending = {"nnunet": "", **dict.fromkeys(("brats2023", "brats2024", "brats-met", "brats-ped"), "-seg")}
    output = output_dir / f"{case.case_id}{ending.get(case.layout, '_seg')}.nii.gz"
    write_atomically(output, lambda target: nib.save(type(image)(array, image.affine, header), target))
    return output


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path}: the picture could not be written")
