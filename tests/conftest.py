"""Data and helpers the tests share: phantom cohorts, writers of tiny cases, what an InputError must be."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Both are read when torch is imported. The suite's processes share the cores; and its values are those of a
# CPU, so a card is not shown to it (CUDA_VISIBLE_DEVICES=0 shows the first).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from cohort.cases import Case
from cohort.phantom import write_cohort
from runtime.errors import InputError

# No deadline: a busy machine is no defect. Derandomized: a red run is red again when it is looked into.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

COHORT_SHAPE = (16, 48, 48)
COHORT_SPACING_MM = (10.0, 5.0, 5.0)
LPS_1MM = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture(scope="session")
def phantom_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 8 internal phantoms with 4 modalities and labels, (16, 48, 48) at (10, 5, 5) mm."""
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_cohort(folder, 8, 0, COHORT_SHAPE, COHORT_SPACING_MM, "internal")
    return folder


@pytest.fixture(scope="session")
def external_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 3 phantoms in the external style, of the shape and spacing of `phantom_cohort`."""
    folder = tmp_path_factory.mktemp("data") / "external"
    write_cohort(folder, 3, 0, COHORT_SHAPE, COHORT_SPACING_MM, "external")
    return folder


@pytest.fixture
def input_error() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """Context manager: the block raises InputError, one sentence on one line, holding each of the names."""

    @contextlib.contextmanager
    def expect(*names: str | Path) -> Iterator[None]:
        with pytest.raises(InputError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        assert message == message.strip()
        for name in names:
            assert str(name) in message

    return expect


@pytest.fixture(scope="session")
def write_nifti() -> Callable[..., Path]:
    """Function (path, array (X, Y, Z), affine=LPS at 1 mm) that writes a NIfTI file and returns its path."""

    def write(path: Path, array: np.ndarray, affine: np.ndarray = LPS_1MM) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)
        return path

    return write


@pytest.fixture(scope="session")
def write_slices() -> Callable[..., Path]:
    """Function that writes a case of picture slices: (folder, case id, {z: pixels}, {z: mask}, suffix).

    Pixels are (H, W), or (H, W, 3) in the order red, green, blue. Pillow writes, as OpenCV reads.
    """

    def write(
        folder: Path,
        case_id: str,
        slices: dict[int, np.ndarray],
        masks: dict[int, np.ndarray] | None = None,
        suffix: str = ".png",
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for z, pixels in slices.items():
            Image.fromarray(pixels).save(folder / f"{case_id}_{z}{suffix}")
        for z, pixels in (masks or {}).items():
            Image.fromarray(pixels).save(folder / f"{case_id}_{z}_mask{suffix}")
        return folder

    return write


@pytest.fixture(scope="session")
def make_cases() -> Callable[[Sequence[tuple[str, str]]], list[Case]]:
    """Function from (case id, patient id) pairs to cases without files, for what looks at ids alone."""

    def make(ids: Sequence[tuple[str, str]]) -> list[Case]:
        return [
            Case(case_id, patient_id, "made", "brats2021", "brats", {"flair": (Path(f"{case_id}.nii"),)}, ())
            for case_id, patient_id in ids
        ]

    return make
