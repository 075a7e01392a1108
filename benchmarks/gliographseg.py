"""GlioGraphSeg, a published network that comes with its weights, on RGB slices: Dice per case.

    python -m benchmarks.gliographseg --data-dir data/lgg_rgb

Amato et al. 2024 (doi 10.1109/AIxDKE63520.2024), PyPI gliographseg 0.1.4: a graph network over superpixels of
a slice whose colours are pre-contrast, FLAIR and post-contrast. It was trained on this data set; which
patients is not published, so its Dice may be flattered.
"""

import contextlib
import io
from dataclasses import dataclass

import cv2
import numpy as np

from audit.statistics import summarise
from benchmarks.common import write_result
from cohort.cases import load_case, with_reference
from cohort.layouts import CaseSource, find_cases
from runtime.command import run_command
from runtime.log import log, progress
from utils_v2 import count_overlap


@dataclass(frozen=True)
class PretrainedConfig:
    """Settings of the measurement."""

    data_dir: str = "data/lgg_rgb"
    """folder of RGB slices"""


def main(config: PretrainedConfig) -> None:
    """Segment every slice of every case, and write Dice per case."""
    from gliographseg import GlioGraphSeg  # a peer of benchmarks/requirements.txt

    network = GlioGraphSeg(device="cpu")
    cases = with_reference(find_cases(CaseSource(config.data_dir), ("flair",)), config.data_dir)
    rows = []
    for case in progress(cases, "segmenting", "case"):
        reference = load_case(case, ("flair",)).labels > 0  # (D, H, W)
        prediction = np.zeros_like(reference)
        for z, path in enumerate(case.modalities["flair"]):
            pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its graphs
                prediction[z] = network.predict_mask(pixels)["mask"] > 0
        rows.append({"case": case.case_id, "dice": count_overlap(reference, prediction).dice})
    dice = summarise([row["dice"] for row in rows], [row["case"] for row in rows])
    log.info("GlioGraphSeg: Dice per case %.3f, n = %d", dice["mean"], dice["n"])
    log.info("%s", write_result("gliographseg", {"dice": dice, "cases": rows}))


if __name__ == "__main__":
    run_command(main, PretrainedConfig, "Measure GlioGraphSeg on RGB slices.")
