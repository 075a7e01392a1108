"""From a case's files to volumes and labels, and back: label conventions, orientation, reading and writing.

nibabel's (X, Y, Z) exists only in this file. Everywhere else a volume is (C, D, H, W) and labels are (D, H,
W), oriented LPS: D runs to superior, H to posterior, W to the patient's left, as BraTS files have it.
"""

import gzip
import hashlib
import itertools
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import cv2
import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from cohort.labels import NO_REGION, round_labels, values_of
from cohort.preprocess import fill_air
from runtime.command import Distinct
from runtime.errors import InputError
from runtime.files import write_atomically
from runtime.log import log

MODALITIES = ("flair", "t1", "t1ce", "t2")
Modality = Literal["flair", "t1", "t1ce", "t2"]
Modalities = Annotated[tuple[Modality, ...], Distinct()]  # as a setting
CANONICAL = axcodes2ornt("LPS")
AFFINE_TOLERANCE_MM = 0.01  # the files of a case may differ by rounding
CORNER_TOLERANCE_MM = 0.5  # sform and qform may place a corner of the volume this far apart: rounding
SPACING_TOLERANCE = 0.002  # pixdim and affine may differ by this share, as 0.938 and 0.9375 do
SHEAR_TOLERANCE = 0.001  # share of a voxel's volume that shear takes and nobody is told of
NIFTI_ERRORS = (
    nib.filebasedimages.ImageFileError,
    HeaderDataError,
    EOFError,
    zlib.error,
    OSError,
    ValueError,
)
SLICES_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # PNG and TIF carry no geometry: 1 mm, LPS, stated as unknown
RGB_CHANNELS = {"t1": 0, "flair": 1, "t1ce": 2}  # kaggle_3m: before contrast, FLAIR, after contrast
INT16_SEAM = 2**14  # int16 files with voxels beyond it on both sides have wrapped around


@dataclass(frozen=True)
class Case:
    """One scan of one patient: where its files are and how to read them."""

    case_id: str
    patient_id: str
    cohort: str
    layout: str  # a key of layouts.LAYOUTS
    convention: str  # a key of LABEL_CONVENTIONS, or one that `values_of` reads
    modalities: dict[str, tuple[Path, ...]]  # one NIfTI file or multi-page TIF, or slices from first to last
    mask: tuple[Path, ...]  # as a modality; empty where there is no reference
    slice_channel: int = 1  # which channel of RGB slices is FLAIR
    volume_index: Mapping[str, int] = field(default_factory=dict)  # per modality, in files of four axes
    aliases: tuple[str, ...] = ()  # other ids of this scan or patient, by a mapping sheet

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the case: those of all its modalities, and its reference."""
        return (*(path for paths in self.modalities.values() for path in paths), *self.mask)


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory, on its native grid, in canonical orientation, with the intensities of the files."""

    volume: np.ndarray  # (C, D, H, W) float32
    labels: np.ndarray | None  # (D, H, W) uint8, values of the case's label convention
    affine: np.ndarray  # (4, 4), canonical voxel (X, Y, Z) to mm
    spacing_mm: tuple[float, float, float]  # (D, H, W); their product is the volume of a voxel
    warnings: tuple[str, ...] = ()  # what deserves a look, without the case's name or its files' paths


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
        return read_slices_of(case, name), SLICES_AFFINE
    if paths[0] not in decoded:
        decoded.clear()
        decoded[paths[0]] = decode_nifti(paths[0])
    return orient_volume(paths[0], *decoded[paths[0]], case.volume_index.get(name))


def measure_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Return the spacing (D, H, W) in mm of a canonical affine (4, 4); its product is a voxel's volume.

    The lengths of the affine's columns, as nibabel has them. Where shear makes their product exceed the
    determinant, the perpendicular distances: of columns along X, of rows within a slice, and of slices.
    """
    matrix = affine[:3, :3]
    edges = nib.affines.voxel_sizes(affine)
    if not np.isclose(edges.prod(), abs(np.linalg.det(matrix)), rtol=1e-6, atol=0):  # float32 rounds to 1e-7
        edges = np.abs(np.diag(np.linalg.qr(matrix)[1]))  # Gram-Schmidt: the product is the determinant
    return tuple(float(size) for size in edges[::-1])


def describe_affine(affine: np.ndarray) -> str:
    """Return the first three rows of an affine in one line."""
    rows = (" ".join(f"{value:.5g}" for value in row) for row in np.round(affine[:3], 4) + 0.0)
    return f"[{'; '.join(rows)}]"


def find_geometry_conflicts(path: Path) -> list[str]:
    """Return a sentence for each disagreement inside a NIfTI header, with both values and which is used.

    nibabel takes the sform where its code is set, else the qform, else pixdim; so does this program.
    """
    image = read_nifti_header(path)
    header, affine = image.header, image.affine
    if not isinstance(header, nib.Nifti1Header) or not np.isfinite(affine).all():
        return []
    edges, volume = nib.affines.voxel_sizes(affine), abs(np.linalg.det(affine[:3, :3]))
    used = "sform" if header["sform_code"] else "qform" if header["qform_code"] else "pixdim"
    conflicts = []
    zooms = np.abs(np.array(header.get_zooms()[:3], float))
    if len(zooms) == 3 and not np.allclose(zooms, edges, rtol=SPACING_TOLERANCE, atol=0):
        conflicts.append(
            f"its pixdim has voxels of {_describe_voxel(zooms, zooms.prod())}, its {used} of "
            f"{_describe_voxel(edges, volume)}; the {used} is used"
        )
    if used == "sform" and header["qform_code"]:
        conflicts += _compare_with_qform(header, affine, image.shape[:3])
    if volume and edges.prod() / volume - 1 > SHEAR_TOLERANCE:
        conflicts.append(
            f"its {used} is sheared: a voxel has {volume:.5g} mm3 by the determinant, {edges.prod():.5g} by "
            "its edges; the determinant is used, and distances in mm leave the shear out"
        )
    return conflicts


def summarise_conflicts(case: Case, modalities: Sequence[str], with_mask: bool) -> list[str]:
    """Return what `find_geometry_conflicts` says of a case's files, each sentence once, after whose it is."""
    if case.layout == "slices":
        return []
    names_of: dict[Path, list[str]] = defaultdict(list)  # the four of MSD share one file
    for name in modalities:
        names_of[case.modalities[name][0]].append(name)
    if with_mask:
        names_of[case.mask[0]].append("mask")
    files_of: dict[str, list[str]] = defaultdict(list)
    for path, names in names_of.items():
        for sentence in find_geometry_conflicts(path):
            files_of[sentence] += names
    return [f"{', '.join(names)}: {sentence}" for sentence, names in files_of.items()]


def _compare_with_qform(header: nib.Nifti1Header, sform: np.ndarray, shape: Sequence[int]) -> list[str]:
    """Return a sentence where qform and sform place a corner of the volume apart, else nothing."""
    try:
        qform = header.get_qform()
    except (HeaderDataError, ValueError):
        return ["its qform is no rotation; the sform is used"]
    last = [max(0, size - 1) for size in shape]
    corners = np.array(list(itertools.product(*((0, end) for end in last))))
    apart = np.linalg.norm(apply_affine(sform, corners) - apply_affine(qform, corners), axis=1).max()
    if apart <= CORNER_TOLERANCE_MM:
        return []
    return [
        f"its sform {describe_affine(sform)} and its qform {describe_affine(qform)} are up to {apart:.3g} mm "
        "apart; the sform is used"
    ]


def _describe_voxel(edges: np.ndarray, volume: float) -> str:
    return f"{' x '.join(f'{edge:.4g}' for edge in edges)} mm ({volume:.4g} mm3)"


def read_slices_of(case: Case, name: str) -> np.ndarray:
    """Return one modality of a case of pictures as (D, H, W) of their own integer type.

    FLAIR is the case's `slice_channel`, or grey; T1 and T1ce are the red and the blue of RGB pictures.
    """
    channel = case.slice_channel if name == "flair" else RGB_CHANNELS[name]
    return read_slices(case.modalities[name], channel, needs_colour=name != "flair")


def one_line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


def count_pages(path: Path) -> int:
    """Return how many pages a TIF file says it has, a cut-off one included; 0 where it is no TIF.

    Only the chain of page directories is followed (TIFF 6.0, section 2; BigTIFF with 8-byte offsets).
    """
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16:
            return 0
        version = struct.unpack_from(f"{order}H", head, 2)[0]
        if version not in (42, 43):
            return 0
        at, count_type, entry_bytes, link_type = (4, "H", 12, "I") if version == 42 else (8, "Q", 20, "Q")
        link = struct.unpack_from(order + link_type, head, at)[0]
        links: set[int] = set()
        while link and link not in links:
            links.add(link)
            file.seek(link)
            count = file.read(struct.calcsize(order + count_type))
            if len(count) < struct.calcsize(order + count_type):
                break
            file.seek(struct.unpack(order + count_type, count)[0] * entry_bytes, 1)
            following = file.read(struct.calcsize(order + link_type))
            if len(following) < struct.calcsize(order + link_type):
                break
            link = struct.unpack(order + link_type, following)[0]
    return len(links)


def is_colour(path: Path) -> bool:
    """Return whether a picture file has three channels or more; False where it is not readable."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return pixels is not None and pixels.ndim == 3 and pixels.shape[2] >= 3


def is_stack(path: Path) -> bool:
    """Return whether a picture file is a TIF of several pages; False where it cannot be opened."""
    try:
        return path.suffix.lower() in (".tif", ".tiff") and count_pages(path) > 1
    except OSError:
        return False


def read_pages(path: Path) -> list[np.ndarray]:
    """Return the pages of a picture, of which all but TIF have one; (H, W), or (H, W, C) in BGR order."""
    if not is_stack(path):
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise InputError(path, "not a readable picture", "export it again")
        return [pixels]
    _, pages = cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)
    if len(pages) != (expected := count_pages(path)):
        raise InputError(path, f"only {len(pages)} of its {expected} pages are readable", "export it again")
    return list(pages)


def read_slices(paths: Sequence[Path], channel: int | None, needs_colour: bool = False) -> np.ndarray:
    """Return the slices of one case as (D, H, W) of their own integer type: one file each, or one of pages.

    Of RGB files one channel; with None, for masks, whatever their colour, the brightest. Grey files have no
    channels and are taken as they are, unless `needs_colour`.
    """
    slices: list[np.ndarray] = []
    for path in paths:
        pages = read_pages(path)
        if len(pages) > 1 and len(paths) > 1:
            raise InputError(
                path, f"has {len(pages)} pages among slices of one", "a multi-page TIF is a case by itself"
            )
        for pixels in pages:
            pixels = _choose_channel(path, pixels, channel, needs_colour)
            if slices and pixels.shape != slices[0].shape:
                raise InputError(path, f"has shape {pixels.shape}, the case's first slice {slices[0].shape}")
            slices.append(pixels)
    return np.stack(slices)


def _choose_channel(path: Path, pixels: np.ndarray, channel: int | None, needs_colour: bool) -> np.ndarray:
    if pixels.ndim == 2:
        if needs_colour:
            raise InputError(path, "is grey, and T1 and T1ce are the red and blue of RGB slices")
        return pixels
    if channel is None:
        return pixels[..., :3].max(-1)
    if not 0 <= channel < min(pixels.shape[2], 3):
        raise InputError(path, f"has no channel {channel}", "--slice-channel takes 0, 1 or 2")
    return pixels[..., 2 - channel]  # OpenCV reads BGR


def read_labels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return (reference labels (D, H, W) uint8, their canonical affine (4, 4)) of a case with a mask.

    Raises InputError on a value the case's convention does not have; float masks may miss it by 1e-3.
    """
    if case.layout == "slices":
        _check_pages(case)
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


def find_copy(name: str, array: np.ndarray, seen: dict[str, str]) -> str | None:
    """Return a sentence where a modality (D, H, W) is voxel for voxel another one of its case, else None.

    `seen`, of the case, maps the hash of each modality so far to its name; this one joins it. In 10 of the
    110 patients of kaggle_3m a sequence that was not scanned is a copy of FLAIR.
    """
    digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
    other = seen.setdefault(digest, name)
    return None if other == name else f"its {name} is a copy of its {other}, voxel for voxel"


def log_warnings(warnings: Sequence[tuple[str, Sequence[str]]], shown: int = 10) -> None:
    """Log what deserves a look in cases, given as (case id, warnings): the first, then how many more."""
    sentences = [f"{case_id}: {sentence}" for case_id, own in warnings for sentence in own]
    for sentence in sentences[:shown]:
        log.warning("%s", sentence)
    if len(sentences) > shown:
        log.warning("and %d more warnings; --check lists all", len(sentences) - shown)


def _check_pages(case: Case) -> None:
    """Raise InputError where a mask has another number of pages than its multi-page TIF, or the reverse."""
    images = next(iter(case.modalities.values()), ())
    if len(images) == len(case.mask) == 1 and (is_stack(images[0]) or is_stack(case.mask[0])):
        expected, pages = count_pages(images[0]) or 1, count_pages(case.mask[0]) or 1
        if pages != expected:
            raise InputError(
                case.mask[0],
                f"this mask has {pages} page{'s' if pages > 1 else ''}, {images[0].name} {expected}",
                "give each page of the case one of the mask",
            )


def check_affine(path: Path, affine: np.ndarray, expected: np.ndarray) -> None:
    """Raise InputError where a file's canonical affine is not that of the first file of its case."""
    if not np.allclose(affine, expected, atol=AFFINE_TOLERANCE_MM):
        raise InputError(
            path,
            f"its affine differs from that of the case's first modality, {describe_affine(affine)} from "
            f"{describe_affine(expected)}",
            "register the files",
        )


def _file_with_value(case: Case, value: float) -> Path:
    if case.layout == "slices":
        return next(path for path in case.mask if (read_slices([path], None) == value).any())
    return case.mask[0]


def load_case(case: Case, modalities: Sequence[str] = ("flair",), with_labels: bool = True) -> LoadedCase:
    """Read a case's modalities, in the order given, and its labels where it has a mask.

    Without `with_labels` the mask is not opened, and the labels are None.

    Raises InputError naming the file where one is unreadable, differs in shape, or holds an unknown label.
    The spacing of PNG and TIF slices is unknown and stated as 1 mm.
    """
    volumes, affine = [], SLICES_AFFINE
    seen: dict[str, str] = {}
    warnings: list[str] = []
    decoded: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    for name in modalities:
        path = case.modalities[name][0]
        array, own_affine = read_modality(case, name, decoded)
        affine = affine if volumes else own_affine
        check_affine(path, own_affine, affine)
        if volumes and array.shape != volumes[0].shape:
            raise InputError(path, f"has shape {array.shape}, the case's {modalities[0]} {volumes[0].shape}")
        array = fill_air(array)
        if not np.isfinite(array).all():
            raise InputError(
                path, "holds NaN or infinite values in the head", "repair it or leave the case out"
            )
        if len(modalities) > 1 and (copy := find_copy(name, array, seen)):
            warnings.append(copy)
        volumes.append(array.astype(np.float32))
    labels = None
    if case.mask and with_labels:
        labels, mask_affine = read_labels(case)
        check_affine(case.mask[0], mask_affine, affine)
    if labels is not None and labels.shape != volumes[0].shape:
        raise InputError(
            case.mask[0], f"the mask has shape {labels.shape}, the {modalities[0]} {volumes[0].shape}"
        )
    warnings += summarise_conflicts(case, modalities, labels is not None)
    return LoadedCase(np.stack(volumes), labels, affine, measure_spacing(affine), tuple(warnings))


Write = Callable[[Path, Callable[[Path], None]], None]  # as `write_atomically`


def is_stack_case(case: Case) -> bool:
    """Return whether a case is one multi-page TIF."""
    return case.layout == "slices" and is_stack(next(iter(case.modalities.values()))[0])


def label_paths(case: Case, output_dir: Path) -> list[Path]:
    """Return the files that `save_labels` writes."""
    paths = next(iter(case.modalities.values()))
    if is_stack_case(case):
        return [output_dir / f"{case.case_id}_mask.tif"]
    if case.layout == "slices":
        return [output_dir / case.case_id / f"{path.stem}_mask.png" for path in paths]
    ending = {"nnunet": "", **dict.fromkeys(("brats2023", "brats2024", "brats-met", "brats-ped"), "-seg")}
    return [output_dir / f"{case.case_id}{ending.get(case.layout, '_seg')}.nii.gz"]


def save_labels(labels: np.ndarray, case: Case, output_dir: Path, write: Write = write_atomically) -> Path:
    """Write predicted labels (D, H, W) beside a case's geometry and return the path.

    NIfTI cases: `<case>_seg.nii.gz` (`<case>-seg.nii.gz` from BraTS 2023 on, `<case>.nii.gz` for nnU-Net, by
    which the layout reads them back), uint8, in the orientation, affine and header of the case's first
    modality. Slice cases: a folder `<case>/` of `<case>_<z>_mask.png`, 0 and 255. A multi-page TIF:
    `<case>_mask.tif` of as many pages, 0 and 255. `write` decides whether a file may be replaced.
    """
    paths = label_paths(case, output_dir)
    if is_stack_case(case):
        pages = list((labels > 0).astype(np.uint8) * 255)
        write(paths[0], lambda target: _write_stack(target, pages))
        return paths[0]
    if case.layout == "slices":
        for path, pixels in zip(paths, labels, strict=True):
            binary = (pixels > 0).astype(np.uint8) * 255
            write(path, lambda target, b=binary: _write_picture(target, b))
        return paths[0].parent
    write(paths[0], lambda target: nib.save(_as_image(labels, case, np.uint8), target))
    return paths[0]


def save_map(values: np.ndarray, case: Case, path: Path, write: Write = write_atomically) -> None:
    """Write a map (D, H, W), such as probabilities, as float32 NIfTI on the grid of a case.

    NIfTI cases give it orientation, affine and header of their first modality. Slice cases, which have none,
    are stacked from the first to the last at 1 mm.
    """
    write(path, lambda target: nib.save(_as_image(values, case, np.float32), target))


def _as_image(values: np.ndarray, case: Case, dtype: type[np.generic]) -> nib.Nifti1Image:
    """Return values (D, H, W) as an image of `dtype` in the orientation of the case's first modality."""
    if case.layout == "slices":
        return nib.Nifti1Image(values.transpose(2, 1, 0).astype(dtype), SLICES_AFFINE)
    image = read_nifti_header(next(iter(case.modalities.values()))[0])
    back = ornt_transform(CANONICAL, io_orientation(image.affine))
    array = apply_orientation(values.transpose(2, 1, 0), back).astype(dtype)
    header = image.header.copy()
    header.set_data_dtype(dtype)
    header["cal_min"], header["cal_max"] = 0, 0  # the input's display window does not fit
    return type(image)(array, image.affine, header)


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path}: the picture could not be written")


def _write_stack(path: Path, pages: list[np.ndarray]) -> None:
    if not cv2.imwritemulti(str(path), pages):
        raise OSError(f"{path}: the pages could not be written")
