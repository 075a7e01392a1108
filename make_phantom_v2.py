"""Make a synthetic cohort in BraTS 2021 layout.

python make_phantom_v2.py --output data/phantom --cases 24 --preview
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import numpy as np
from matplotlib.figure import Figure

from cohort.phantom import FIRST_ID, MODALITIES, Phantom, check_phantom_folder, make_phantom, write_cohort
from runtime.command import Count, Seed, run_command
from runtime.files import check_output, write_atomically, write_output
from runtime.log import log


def draw_preview(path: Path, phantom: Phantom) -> None:
    """Draw a phantom as a PNG: three axial slices through its tumour, each modality and the labels."""
    figure = Figure(figsize=(15, 9.5), facecolor="black", layout="tight")
    panels = figure.subplots(3, len(MODALITIES) + 1)
    aspect = phantom.spacing_mm[1] / phantom.spacing_mm[2]
    white = {name: np.percentile(volume[volume > 0], 99.7) for name, volume in phantom.modalities.items()}
    tumour_slices = np.flatnonzero(phantom.labels.any((1, 2)))
    for row, share in zip(panels, (0.25, 0.5, 0.75), strict=True):
        index = tumour_slices[int(share * len(tumour_slices))]
        for panel, (name, volume) in zip(row, phantom.modalities.items(), strict=False):
            panel.imshow(volume[index], "gray", vmin=0, vmax=white[name], aspect=aspect)
            panel.set_title(f"{name}, slice {index}", color="white")
        row[-1].imshow(phantom.labels[index], "inferno", vmin=0, vmax=4, aspect=aspect)
        row[-1].set_title("labels 1, 2, 4", color="white")
    for panel in panels.flat:
        panel.axis("off")
    write_atomically(path, lambda part: figure.savefig(part, dpi=80))


@dataclass(frozen=True)
class PhantomConfig:
    """Settings of the command, one a flag."""

    output: str = "data/phantom"
    """folder to write the cohort to"""
    cases: Count = 24
    """number of cases"""
    seed: Seed = 0
    """seed of the cohort; another seed gives other heads"""
    style: Literal["internal", "external"] = "internal"
    """look of the images; external is another scanner"""
    shape: tuple[int, int, int] = (40, 120, 120)
    """voxels along D H W; BraTS is 155 240 240"""
    spacing_mm: tuple[float, float, float] = (4.0, 2.0, 2.0)
    """voxel size in mm along D H W; BraTS is 1 1 1"""
    preview: bool = False
    """also write preview.png, the first case to look at, to the folder"""
    overwrite: bool = False
    """replace files that this program did not write, should some have the names of phantoms"""


def main(config: PhantomConfig) -> None:
    """Write a cohort as the config says."""
    output, preview = Path(config.output), Path(config.output) / "preview.png"
    if not config.overwrite:
        check_phantom_folder(output, config.cases, config.style)
    if config.preview:
        check_output(preview, config.overwrite)
    folders = write_cohort(output, config.cases, config.seed, config.shape, config.spacing_mm, config.style)
    if config.preview:
        first_seed = 100_000 * config.seed + FIRST_ID[config.style]
        first = make_phantom(first_seed, config.shape, config.spacing_mm, config.style)
        write_output(preview, lambda target: draw_preview(target, first), config.overwrite)
    log.info(f"{len(folders)} synthetic phantoms (no BraTS data) of style {config.style} in {output}")


if __name__ == "__main__":
    run_command(main, PhantomConfig, "Write a synthetic brain tumour cohort in BraTS 2021 layout.")
