"""What the columns and words of the audit's page mean, said once."""

TERMS = {
    "case": "One scan of the cohort; some patients have several.",
    "cohort": "internal: the run's own test cases, kept from training and validation of the network that "
    "tests them. external: cases of another source. external_unseen: external without the cases found in "
    "training. validation: what threshold and post-processing were chosen on, with --keep best the epoch "
    "too. predictions: masks of another tool.",
    "region": "WT whole tumour, TC tumour core, ET enhancing tumour.",
    "mode": "plain: the network once. TTA: the mean probability of the slice and its two flips.",
    "cases / patients": "How many cases and patients the numbers are of.",
    "Dice": "2 TP / (2 TP + FP + FN) of the whole volume on the native grid; both masks empty is 1, "
    "exactly one is 0.",
    "Dice per case": "Dice of each whole volume on the native grid, then the mean over cases. Both masks "
    "empty is 1, exactly one is 0.",
    "95 % CI": "Bootstrap interval of the mean over patients. Of fewer than six patients none is stated "
    "but the range and n.",
    "SD": "Standard deviation over cases.",
    "median": "Median over cases.",
    "precision": "TP / (TP + FP), mean over cases; undefined where nothing is predicted.",
    "recall": "TP / (TP + FN), mean over cases; undefined where the reference is empty.",
    "HD95 mm": "95th percentile of the surface distances (the official BraTS one); both masks empty is 0, "
    "exactly one is 374 mm.",
    "NSD 1 mm": "Share of both surfaces within 1 mm of the other; both masks empty is 1, exactly one is 0.",
    "slice Dice": "Mean over slices with reference tumour.",
    "pooled Dice": "All voxels of the cohort together.",
    "empty ref / pred": "Cases whose reference, and whose prediction, is empty.",
    "effect of": "What is switched on in the second of two masks of a case.",
    "change of Dice per case": "Dice with minus Dice without, paired: mean over cases.",
    "sign-flip p": "Two-sided p by flipping the sign of each patient's differences.",
    "cases": "How many cases the number is of.",
    "lesion Dice": "By the BraTS 2023 rule per case, then the mean: the reference dilated by 3 groups "
    "voxels into lesions (26-connected), lesions up to 50 mm3 are left out, each missed and each false "
    "lesion counts 0.",
    "lesion HD95 mm": "As lesion Dice; each missed and each false lesion counts 374 mm.",
    "lesions found / missed / false": "Lesions of the reference found and missed, and predicted ones that "
    "are none, by the rule of lesion Dice.",
    "lesions": "Lesions of the reference found / missed / predicted ones that are none, by the rule of "
    "lesion Dice.",
    "volume error ml": "Prediction minus reference, mean over cases.",
    "limits of agreement": "Mean volume error and 1.96 SD to both sides.",
    "post-processing": "Small components removed and holes filled, as chosen on validation.",
    "expected calibration error": "Mean over the brain's voxels of the gap between predicted probability "
    "and share of reference tumour, in 20 equal bins, before post-processing. Most voxels are healthy and "
    "easy, which makes it small.",
    "of the uncertain": "The same over the voxels of probability 0.05 to 0.95.",
    "voxels of brain": "Over how many voxels: those of all validation cases together.",
    "uncertain ones": "How many of them have a probability from 0.05 to 0.95.",
    "rank correlation of Dice and uncertainty": "Spearman's over cases: near -1 a high uncertainty means "
    "a low Dice, near 0 it says nothing. None below three cases.",
    "uncertainty": "SD of the probability over the three views of TTA, or over the networks where several "
    "are averaged; mean over the predicted voxels, or over the brain where nothing is predicted.",
    "reference ml": "Volume of the reference.",
    "prediction ml": "Volume of the prediction.",
    "notes": "What is odd about the case: seen in training, spacing, intensities.",
    "evidence": "By what a tested case was found in training or validation.",
    "grade": "What that evidence proves.",
    "training_case": "The case of training or validation that it was found as.",
    "similarity": "Of the two thumbnails, 1 is equal.",
    "correlation": "Of the two volumes.",
}
