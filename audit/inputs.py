"""The cases that inference segments: which they are, and each as the network needs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audit.output import ReadCase, Row, failed_row, warn_of_intensities
from cohort.cases import Case, load_case, normalise_case, warn_of_missing
from cohort.inputs import find_readable
from cohort.layouts import CaseSource, find_cases_of_run
from cohort.preprocess import BRAIN_SLICE_VOXELS, NO_SLICE_TO_RUN, Frame, find_head_box, place_modalities
from cohort.several import show_folders
from cohort.split import cases_of_split, read_split
from runtime.errors import InputError
from runtime.log import log


def choose_inputs(config: Any, model: Any, checkpoint: Path, failed: list[Row] | None = None) -> list[Case]:
    """Return the cases to segment: those named, or the held-out test cases of the checkpoint's run.

    Cases that cannot be told or lack a modality are left out and added to `failed`, as rows of volumes.csv.
    `config` is the InferenceConfig of inference_v2, `model` its TrainedModel. Raises InputError where no case
    is left.
    """
    if not config.input:
        settings = model.checkpoint["config"]
        if model.is_ensemble and "split_sha256" not in model.checkpoint:
            raise InputError(
                checkpoint, "its networks have no test cases in common", "name some cases by --input"
            )
        if "data_dir" not in settings:
            raise InputError(checkpoint, "an exported network knows no test cases", "name some by --input")
        data_dir = settings["data_dir"]
        log.info("no --input: segmenting the held-out test cases of %s", show_folders(data_dir))
        cases = find_cases_of_run(settings, data_dir)
        split = read_split(checkpoint.parent / "split.json")
        return cases_of_split(cases, split, "test", show_folders(data_dir))
    cases, errors = find_readable(
        config.input,
        CaseSource(layout=config.layout, slice_channel=config.slice_channel),
        model.modalities,
        model.is_partial,
    )
    if failed is not None:
        failed += [failed_row(name, error) for name, error in errors]
    return cases


def read_case(case: Case, modalities: Sequence[str]) -> ReadCase:
    """Read and normalise one case; of the raw intensities only those of its first modality stay."""
    present = [name for name in modalities if name in case.modalities]
    loaded = load_case(case, present, with_labels=False)
    volume, brain = normalise_case(case, loaded, present)
    volume = place_modalities(volume, present, modalities)
    brain_voxels = brain.sum((1, 2))
    if brain_voxels.max() < BRAIN_SLICE_VOXELS:  # "0.0 ml" would not be a finding
        raise InputError(case.modalities[present[0]][0], NO_SLICE_TO_RUN, "look at the scan")
    warnings = warn_of_missing([name for name in modalities if name not in present])
    warnings += [*loaded.warnings, *warn_of_intensities(loaded.volume, present)]
    frame = Frame(find_head_box(brain), loaded.spacing_mm if case.layout != "slices" else None)
    first = loaded.volume[0].copy()
    return ReadCase(case, volume, brain_voxels, first, loaded.spacing_mm, frame, tuple(warnings))
