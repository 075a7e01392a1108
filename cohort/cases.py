"""From a case's files to volumes and labels, and back.

A volume is (C, D, H, W) and labels are (D, H, W), oriented LPS; see `nifti`.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from cohort.labels import NO_REGION, round_labels, values_of
from cohort.nifti import (
    CANONICAL,
    check_affine,
    decode_nifti,
    find_geometry_conflicts,
    measure_spacing,
    orient_volume,
    read_nifti_header,
    read_nifti_volume,
)
from cohort.pictures import (
    RGB_CHANNELS,
    SLICES_AFFINE,
    count_pages,
    is_stack,
    read_slices,
    write_picture,
    write_stack,
)
from cohort.preprocess import fill_air, find_fault, find_no_brain, normalise_volume
from runtime.command import Distinct
from runtime.errors import InputError
from runtime.files import write_atomically
from runtime.log import log

MODALITIES = ("flair", "t1", "t1ce", "t2")
Modality = Literal["flair", "t1", "t1ce", "t2"]
Modalities = Annotated[tuple[Modality, ...], Distinct()]  # as a setting


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


def read_slices_of(case: Case, name: str) -> np.ndarray:
    """Return one modality of a case of pictures as (D, H, W) of their own integer type.

    FLAIR is the case's `slice_channel`, or grey; T1 and T1ce are the red and the blue of RGB pictures.
    """
    channel = case.slice_channel if name == "flair" else RGB_CHANNELS[name]
    return read_slices(case.modalities[name], channel, needs_colour=name != "flair")


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
        if fault := find_fault(array):
            raise InputError(path, f"its {name} {fault}", "repair it or leave the case out")
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


def normalise_case(
    case: Case, loaded: LoadedCase, modalities: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return `normalise_volume` of a loaded case; InputError where a modality shows no brain."""
    scores, brain = normalise_volume(loaded.volume)
    for name, intensities, own in zip(modalities, loaded.volume, scores, strict=True):
        if problem := find_no_brain(intensities, bool(own.any())):  # 0 where nothing is foreground
            place = case.modalities[name][0]
            raise InputError(place, f"its {name} {problem}", "repair it or leave the case out")
    return scores, brain


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
        write(paths[0], lambda target: write_stack(target, pages))
        return paths[0]
    if case.layout == "slices":
        for path, pixels in zip(paths, labels, strict=True):
            binary = (pixels > 0).astype(np.uint8) * 255
            write(path, lambda target, b=binary: write_picture(target, b))
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
