"""Lesion-wise Dice and HD95 as the BraTS 2023 challenge scores them.

The rule (github.com/rachitsaluja/BraTS-2023-Metrics; announced on synapse.org/Synapse:syn51156910), with the
numbers of the adult-glioma, Africa and paediatric tasks, the same for WT, TC and ET:

1. The reference is dilated three times with the 18-neighbourhood; what then hangs together (26-connectivity)
   is one lesion. The dilation only groups and assigns: every lesion is scored with its own voxels.
2. The prediction is split into its 26-connected components. A lesion's prediction is all components that
   touch the dilated lesion, whole, so one component may serve two lesions. A lesion without any is a false
   negative; a component that touches no lesion is a false positive, however small.
3. Lesions of at most 50 mm3 are left out of the score and of the counts. What touches them is no false
   positive.
4. The case's Dice and HD95 are means over the lesions left and the false positives, of which each missed or
   false one counts Dice 0 and HD95 374 mm. With nothing to score they are 1 and 0.

The meningioma and metastasis tasks dilate once, and the latter drop up to 2 mm3: other rules, not here.
Dilation is in voxels, as there, which at BraTS's 1 mm are millimetres.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from utils_v2 import HD95_ONE_EMPTY_MM, bounding_box, check_masks, dice_score, hd95

DILATIONS = 3
SMALLEST_LESION_MM3 = 50.0  # up to and with this, a lesion of the reference is not scored
NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)
NEIGHBOURS_26 = ndimage.generate_binary_structure(3, 3)


@dataclass(frozen=True)
class LesionScores:
    """The lesion-wise scores of one region of one case."""

    dice: float
    hd95_mm: float
    tp: int  # lesions of the reference that a prediction touches
    fp: int  # components of the prediction that touch no lesion
    fn: int  # lesions of the reference that no prediction touches


def score_lesions(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> LesionScores:
    """Return the lesion-wise scores of two bool masks (D, H, W), spacing (D, H, W) in mm; see the module."""
    check_masks(reference, prediction)
    either = reference | prediction
    if not either.any():
        return LesionScores(1.0, 0.0, 0, 0, 0)
    box = tuple(slice(max(0, edge.start - DILATIONS), edge.stop + DILATIONS) for edge in bounding_box(either))
    reference, prediction = reference[box], prediction[box]
    dilated = ndimage.binary_dilation(reference, NEIGHBOURS_18, DILATIONS)
    extent, lesions = ndimage.label(dilated, NEIGHBOURS_26)  # the lesion a voxel is of, or near to
    components, found = ndimage.label(prediction, NEIGHBOURS_26)
    touching = components.astype(np.int64) * (lesions + 1) + extent
    pairs = np.unique(touching[prediction & dilated])
    touched = [(int(pair) // (lesions + 1), int(pair) % (lesions + 1)) for pair in pairs]

    dice, distances, tp, fn = [], [], 0, 0
    for lesion in range(1, lesions + 1):
        its_voxels = reference & (extent == lesion)
        if its_voxels.sum() * float(np.prod(spacing_mm)) <= SMALLEST_LESION_MM3:
            continue
        numbers = [component for component, other in touched if other == lesion]
        if not numbers:
            fn += 1
            continue
        tp += 1
        its_prediction = np.isin(components, numbers)
        dice.append(dice_score(its_voxels, its_prediction))
        distances.append(hd95(its_voxels, its_prediction, spacing_mm))
    fp = found - len({component for component, _ in touched})
    scored = tp + fp + fn
    if not scored:
        return LesionScores(1.0, 0.0, 0, 0, 0)
    penalty_mm = HD95_ONE_EMPTY_MM * (fp + fn)
    return LesionScores(sum(dice) / scored, (sum(distances) + penalty_mm) / scored, tp, fp, fn)
