"""NIfTI files: reading, orientation, and what their headers say of geometry.

nibabel's (X, Y, Z) exists only here and where `cases` writes. Elsewhere a volume is (D, H, W), oriented LPS:
D runs to superior, H to posterior, W to the patient's left, as BraTS files have it.
"""

import contextlib
import gzip
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from cohort.limits import SPACING_RANGE_MM, check_unpacked, check_voxels
from runtime.errors import InputError

CANONICAL = axcodes2ornt("LPS")
AFFINE_TOLERANCE_MM = 0.01  # the files of a case may differ by rounding
CORNER_TOLERANCE_MM = 0.5  # sform and qform may place a corner of the volume this far apart: rounding
SPACING_TOLERANCE = 0.002  # pixdim and affine may differ by this share, as 0.938 and 0.9375 do
SHEAR_TOLERANCE = 0.001  # share of a voxel's volume that shear takes and nobody is told of
NIFTI_ERRORS = (
    nib.filebasedimages.ImageFileError,
    HeaderDataError,
    WrapStructError,
    EOFError,
    zlib.error,
    OSError,
    ValueError,
    KeyError,
    OverflowError,
)
TRAILING_BYTES = 2**16  # that may follow the voxels, as some tools pad their files
MOST_EXTENSION_BYTES = 2**26  # between header and voxels
INT16_SEAM = 2**14  # int16 files with voxels beyond it on both sides have wrapped around


def open_nifti(path: Path) -> BinaryIO:
    """Open a .nii or .nii.gz file for its unpacked bytes."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


@contextlib.contextmanager
def name_unreadable(path: Path) -> Iterator[None]:
    """Raise InputError, which names the file, where it is missing or no NIfTI."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(path, "no such file") from None
    except NIFTI_ERRORS as error:
        raise InputError(
            path, f"not a readable NIfTI file ({one_line(error)})", "download it again"
        ) from error


def measure_declared(path: Path) -> int:
    """Return how many bytes, unpacked, a NIfTI file has by its header, of which alone is read.

    Raises InputError where that is more than is read, or another size than the file can have.
    """
    with name_unreadable(path):
        with open_nifti(path) as file:
            start = file.read(540)
        kind = nib.Nifti2Header if 540 in (_first_int(start, "little"), _first_int(start, "big")) else None
        kind = kind or nib.Nifti1Header
        header = kind(
            start[: kind.template_dtype.itemsize].ljust(kind.template_dtype.itemsize, b"\0"), check=False
        )
        shape = tuple(map(int, header.get_data_shape()))
        first = int(header.get_data_offset())
        voxel_bytes = header.get_data_dtype().itemsize
        size = path.stat().st_size
    check_voxels(path, math.prod(shape), f"a shape of {' x '.join(map(str, shape))}")
    if any(length < 1 for length in shape) or not 0 <= first <= MOST_EXTENSION_BYTES:
        raise InputError(
            path, f"declares a shape of {shape} from byte {first} on: damaged", "download it again"
        )
    declared = first + math.prod(shape) * voxel_bytes
    if path.suffix.lower() == ".gz":
        check_unpacked(path, declared, size)
    elif not declared <= size <= declared + TRAILING_BYTES:
        raise InputError(path, f"declares {declared:,} bytes and has {size:,}: damaged", "download it again")
    return declared


def _first_int(start: bytes, order: Literal["little", "big"]) -> int:
    return int.from_bytes(start[:4], order)


def read_nifti_header(path: Path) -> nib.Nifti1Image:
    """Open a NIfTI file for its header and affine; raises InputError where it is missing or no NIfTI."""
    measure_declared(path)
    with name_unreadable(path):
        return nib.load(path)


def decode_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (X, Y, Z) or (X, Y, Z, V), affine (4, 4)) as they lie in the file.

    No more is unpacked than its header declares. A .gz file is read to its end, so that its checksum is
    verified. Intensities of int16 files that wrapped around at 32767 are put right.
    """
    declared = measure_declared(path)
    is_nifti2 = isinstance(read_nifti_header(path), nib.Nifti2Image)
    try:
        with open_nifti(path) as file:
            content = file.read(declared)
            more = len(file.read(TRAILING_BYTES + 1))
        if len(content) < declared or more > TRAILING_BYTES:
            has = f"{len(content):,}" if len(content) < declared else "more"
            raise ValueError(f"its header declares {declared:,} bytes and it has {has}")
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
    check_spacing(path, affine)
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
    if array.ndim != 3 or array.dtype.fields or array.dtype.kind not in "iuf":
        raise InputError(path, f"has shape {array.shape} of {array.dtype}", "one grey volume is needed")
    canonical_affine = affine @ inv_ornt_aff(turn, array.shape)
    return apply_orientation(array, turn).transpose(2, 1, 0), canonical_affine


def read_nifti_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (array (D, H, W), affine (4, 4) of its canonical X, Y, Z), whatever the file's orientation."""
    return orient_volume(path, *decode_nifti(path))


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


def check_spacing(path: Path, affine: np.ndarray) -> None:
    """Raise InputError where an affine (4, 4) has no spacing that a scan can have."""
    low, high = SPACING_RANGE_MM
    spacing = measure_spacing(affine) if np.isfinite(affine).all() else (math.nan,) * 3
    if not all(low <= size <= high for size in spacing):
        sizes = " x ".join(f"{size:.4g}" for size in spacing)
        raise InputError(
            path,
            f"its voxels are {sizes} mm by its header, and scans have {low:g} to {high:g}",
            "repair the header",
        )


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


def one_line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


def check_affine(path: Path, affine: np.ndarray, expected: np.ndarray) -> None:
    """Raise InputError where a file's canonical affine is not that of the first file of its case."""
    if not np.allclose(affine, expected, atol=AFFINE_TOLERANCE_MM):
        raise InputError(
            path,
            f"its affine differs from that of the case's first modality, {describe_affine(affine)} from "
            f"{describe_affine(expected)}",
            "register the files",
        )
