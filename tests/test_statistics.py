"""Intervals, paired tests, agreement and calibration: values by hand, and what must hold whatever comes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from audit.statistics import (
    CALIBRATION_EDGES,
    bootstrap_means,
    compare_paired,
    format_spread,
    limits_of_agreement,
    reliability_counts,
    sign_flip_p,
    summarise,
    summarise_calibration,
)

# ------------------------------------------------------------------------------------------------------------
# Summary and bootstrap
# ------------------------------------------------------------------------------------------------------------


def test_bootstrap_draws_patients_with_all_their_cases() -> None:
    # Patient a: 9 cases of 1, patient b: 1 case of 0. Draws of two patients are aa, ab, ba, bb: mean 1, 0.9,
    # 0.9, 0. Resampling cases would give 0 once in 10^10 draws, and 0.8 often.
    means = bootstrap_means(
        np.array([1.0] * 4 + [0.0] + [1.0] * 5), ["a"] * 4 + ["b"] + ["a"] * 5, draws=4000
    )
    assert means.shape == (4000,)
    distinct, counts = np.unique(means.round(9), return_counts=True)
    assert distinct.tolist() == [0.0, 0.9, 1.0]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.04)  # 5 standard errors


def test_bootstrap_of_single_cases_spreads_like_the_standard_error() -> None:
    values = np.random.default_rng(3).normal(0.8, 0.1, 40)
    means = bootstrap_means(values, [f"p{i}" for i in range(40)], draws=20_000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.001)
    assert means.std() == pytest.approx(values.std() / math.sqrt(40), rel=0.03)


def test_bootstrap_is_seeded() -> None:
    values, patients = np.arange(12.0), list("aabbccddeeff")
    first = bootstrap_means(values, patients, draws=100, seed=5)
    assert np.array_equal(first, bootstrap_means(values, patients, draws=100, seed=5))
    assert not np.array_equal(first, bootstrap_means(values, patients, draws=100, seed=6))


def test_bootstrap_is_blind_to_the_order_of_cases() -> None:
    values, patients = np.arange(12.0), list("aabbccddeeff")
    order = np.random.default_rng(0).permutation(12)
    turned = bootstrap_means(values[order], [patients[i] for i in order], draws=100)
    assert turned == pytest.approx(bootstrap_means(values, patients, draws=100))


def test_summary_by_hand() -> None:
    # mean 5; squared deviations 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, over 7; the middle two are 4 and 5
    summary = summarise([2, 4, 4, 4, 5, 5, 7, 9], list("abcdefgh"))
    assert summary["mean"] == 5
    assert summary["sd"] == pytest.approx(math.sqrt(32 / 7))
    assert summary["median"] == 4.5
    assert summary["n"] == 8
    assert summary["n_undefined"] == 0
    low, high = summary["ci95"]
    # normal theory: 5 +- 1.96 * sqrt(32 / 8 / 8), roughly
    assert low == pytest.approx(3.6, abs=0.25)
    assert high == pytest.approx(6.4, abs=0.25)


def test_summary_interval_is_over_patients() -> None:
    # Patient a: 95 cases of 1, five others: a case of 0 each. A draw without a, (5 / 6)^6 or one in three
    # of them, has mean 0; over cases the lowest mean of 10,000 draws would be far above
    summary = summarise([1.0] * 95 + [0.0] * 5, ["a"] * 95 + list("bcdef"))
    assert summary["ci95"][0] == 0
    assert summary["ci95"][1] > 0.95


def test_summary_of_five_patients_has_a_range_and_no_interval() -> None:
    five, six = list("abcde"), list("abcdef")
    values = [0.5, 0.9, 0.7, 0.6, 0.8]
    summary = summarise(values, five)
    assert (summary["ci95"], summary["range"], summary["n"]) == (None, [0.5, 0.9], 5)
    # patients count, not cases: five of two cases each, and six of which one has no defined value
    assert summarise([*values, *values], [*five, *five])["ci95"] is None
    assert summarise([*values, math.nan], six)["ci95"] is None
    low, high = summarise([*values, 0.4], six)["ci95"]
    assert 0.4 <= low < 0.65 < high <= 0.9
    assert summarise([*values, 0.4], six)["range"] == [0.4, 0.9]
    paired = compare_paired(values, [0.4] * 5, five)
    assert paired["ci95"] is None
    assert paired["range"] == pytest.approx([0.1, 0.5])
    assert paired["p_sign_flip"] == 2 / 2**5


def test_spread_in_words_is_the_interval_or_the_range_with_n() -> None:
    few = summarise([0.5, 0.9], ["a", "b"])
    assert format_spread(few, "{:.2f}", "95 % interval ") == "range 0.50 to 0.90, n = 2"
    assert format_spread(few | {"ci95": [0.51, 0.89]}, "{:.2f}", "95 % interval ") == (
        "95 % interval 0.51 to 0.89"
    )
    assert format_spread(summarise([], []), "{:.2f}") == "n = 0"
    assert format_spread({"ci95": None, "n": 1}, "{:.2f}") == "n = 1"  # of an earlier version


def test_summary_leaves_nan_out_with_its_patient_and_counts_it() -> None:
    nan = float("nan")
    with_nan = summarise([nan, 1.0, 0.0, nan, 0.5], ["z", "a", "b", "a", "c"])
    without = summarise([1.0, 0.0, 0.5], ["a", "b", "c"])
    assert with_nan.pop("n_undefined") == 2
    assert without.pop("n_undefined") == 0
    assert with_nan == without
    assert with_nan["n"] == 3


@pytest.mark.parametrize("values", [[], [float("nan")] * 3])
def test_summary_of_no_value_has_no_statistic(values: list[float]) -> None:
    assert summarise(values, ["a"] * len(values)) == {
        "mean": None,
        "sd": None,
        "median": None,
        "range": None,
        "ci95": None,
        "n": 0,
        "n_undefined": len(values),
    }


def test_summary_tells_no_spread_of_one_case_and_no_interval_of_one_patient() -> None:
    one_case = summarise([0.7], ["a"])
    assert (one_case["mean"], one_case["median"], one_case["n"]) == (0.7, 0.7, 1)
    assert one_case["sd"] is None
    assert one_case["ci95"] is None
    assert one_case["range"] == [0.7, 0.7]
    one_patient = summarise([0.25, 0.75], ["a", "a"])
    assert one_patient["sd"] == pytest.approx(math.sqrt(1 / 8))
    assert one_patient["ci95"] is None


def test_summary_refuses_values_without_their_patients() -> None:
    with pytest.raises(ValueError, match="zip"):
        summarise([0.5, 0.6, 0.7], ["a", "b"])


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abcdefghij")), min_size=6, max_size=30),
    st.integers(0, 100),
)
def test_summary_interval_holds_the_mean_and_is_reproducible(
    cases: list[tuple[float, str]], seed: int
) -> None:
    values, patients = zip(*cases, strict=True)
    assume(len(set(patients)) >= 6)
    summary = summarise(values, patients, seed=seed)
    low, high = summary["ci95"]
    assert min(values) - 1e-12 <= low <= summary["mean"] + 1e-9
    assert summary["mean"] - 1e-9 <= high <= max(values) + 1e-12
    assert summary == summarise(values, patients, seed=seed)


# ------------------------------------------------------------------------------------------------------------
# Paired differences
# ------------------------------------------------------------------------------------------------------------


def test_sign_flip_p_by_hand() -> None:
    # sums of +-1 +-2 +-3: 6, 4, 2, 0, 0, -2, -4, -6. At least 6 from 0: two of eight
    assert sign_flip_p([1, 2, 3], list("abc")) == 2 / 8
    # -1 + 2 + 3 = 4: four of eight are as far
    assert sign_flip_p([-1, 2, 3], list("abc")) == 4 / 8
    assert sign_flip_p([0, 0, 0], list("abc")) == 1
    assert sign_flip_p([0.7], ["a"]) == 1


def test_all_sign_patterns_of_13_patients_are_tried() -> None:
    # 2^13 = 8,192 are no more than 10,000: only the pattern seen and its opposite are as far
    patients = [f"p{i}" for i in range(13)]
    assert sign_flip_p(np.arange(1.0, 14.0), patients) == 2 / 2**13


def test_rounding_decides_nothing_where_differences_cancel() -> None:
    # the sum seen is 0 on paper and 2.8e-17 in floats, other patterns sum to 0 exactly: all are as far
    assert sign_flip_p([0.1, 0.1, 0.1, -0.1, -0.2], list("abcde")) == 1


def test_sign_flips_go_by_patient() -> None:
    # patient a flips as a whole: sums are +-(1 + 2) +-3, of which 6, 0, 0, -6: two of four
    assert sign_flip_p([1, 2, 3], list("aab")) == 2 / 4


def test_sign_flip_p_leaves_nan_out() -> None:
    assert sign_flip_p([1, math.nan, 2, 3], list("axbc")) == 2 / 8
    assert sign_flip_p([math.nan], ["a"]) is None
    assert sign_flip_p([], []) is None


def test_sampled_sign_flips_come_near_the_exact_p_are_seeded_and_never_0() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1, 16)  # 65,536 patterns: sampled
    patients = [f"p{i}" for i in range(16)]
    signs = np.array(list(itertools.product((1, -1), repeat=16)))
    exact = (abs(signs @ values) >= abs(values.sum()) - 1e-9).mean()
    sampled = sign_flip_p(values, patients)
    assert sampled == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 10_000))
    assert sampled == sign_flip_p(values, patients)
    assert sign_flip_p(np.full(40, 0.1), [f"p{i}" for i in range(40)]) == 1 / 10_001


@settings(max_examples=30)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_sign_flip_p_is_blind_to_order_direction_and_scale(values: list[float]) -> None:
    values = np.round(values, 3)
    patients = [f"p{i}" for i in range(len(values))]
    p = sign_flip_p(values, patients)
    assert 2 / 2 ** len(values) <= p <= 1
    assert p == sign_flip_p(-values, patients)
    assert p == sign_flip_p(values[::-1], patients)
    assert p == sign_flip_p(7 * values, patients)


def test_sign_flip_p_is_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    patients = [f"p{i}" for i in range(8)]
    p = [sign_flip_p(rng.normal(size=8), patients) for _ in range(300)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=0.1)


def test_paired_comparison_sees_what_two_intervals_do_not() -> None:
    # cases differ by far more than the methods do; each case has the methods 0.01 apart
    first = np.linspace(0.2, 0.9, 20)
    patients = [f"p{i}" for i in range(20)]
    found = compare_paired(first + 0.01, first, patients)
    assert found["mean"] == pytest.approx(0.01)
    assert found["ci95"] == pytest.approx([0.01, 0.01])
    assert found["p_sign_flip"] < 0.001
    low, high = summarise(first, patients)["ci95"]
    assert high - low > 0.1
    other = compare_paired(first, first + 0.01, patients)
    assert other["mean"] == pytest.approx(-found["mean"])
    assert other["p_sign_flip"] == found["p_sign_flip"]


def test_paired_comparison_leaves_out_a_pair_with_nan() -> None:
    found = compare_paired([1, math.nan, 3], [0.5, 1, math.nan], list("abc"))
    assert (found["mean"], found["n"], found["n_undefined"]) == (0.5, 1, 2)


# ------------------------------------------------------------------------------------------------------------
# Agreement and calibration
# ------------------------------------------------------------------------------------------------------------


def test_limits_of_agreement_by_hand() -> None:
    # mean 2, squared deviations 4 + 0 + 4 over 2: SD 2
    assert limits_of_agreement([0, 2, 4]) == pytest.approx([2 - 1.96 * 2, 2 + 1.96 * 2])
    assert limits_of_agreement([5]) is None


def test_reliability_by_hand() -> None:
    edges = np.array([0, 0.5, 1])
    probability = np.array([0.0, 0.2, 0.4, 0.5, 0.9, 1.0])
    reference = np.array([False, False, True, True, True, False])
    counts = reliability_counts(probability, reference, edges)
    assert counts == pytest.approx(np.array([[3, 0.6, 1], [3, 2.4, 2]]))
    found = summarise_calibration(counts, edges)
    # bins: |0.2 - 1/3| and |0.8 - 2/3|, each over half of the voxels
    assert found["ece"] == pytest.approx(2 / 15)
    assert found["mean_probability"] == pytest.approx([0.2, 0.8])
    assert found["reference_share"] == pytest.approx([1 / 3, 2 / 3])
    assert found["n_voxels"] == 6
    assert found["ece_uncertain"] is None  # no bin between the outermost


def test_reliability_of_the_uncertain_leaves_out_the_outermost_bins() -> None:
    probability = np.array([0.01] * 90 + [0.51] * 10)
    reference = np.zeros(100, bool)
    found = summarise_calibration(reliability_counts(probability, reference))
    assert found["ece"] == pytest.approx(0.9 * 0.01 + 0.1 * 0.51)
    assert found["ece_uncertain"] == pytest.approx(0.51)
    assert found["n_voxels_uncertain"] == 10


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(40_000)
    reference = rng.random(40_000) < probability
    assert summarise_calibration(reliability_counts(probability, reference))["ece"] < 0.02
    sharper = np.where(probability > 0.5, 1.0, 0.0)
    # sharpened, each voxel is 1/4 too sure on average
    assert summarise_calibration(reliability_counts(sharper, reference))["ece"] == pytest.approx(
        0.25, abs=0.02
    )


def test_calibration_of_no_voxel_has_no_error() -> None:
    found = summarise_calibration(np.zeros((len(CALIBRATION_EDGES) - 1, 3)))
    assert found["ece"] is None
    assert found["n_voxels"] == 0


@given(
    arrays.arrays(np.float32, 30, elements=st.floats(0, 1, width=32)),
    arrays.arrays(bool, 30),
    st.integers(0, 30),
)
def test_reliability_counts_add_up_and_bound_the_error(
    probability: np.ndarray, reference: np.ndarray, cut: int
) -> None:
    whole = reliability_counts(probability, reference)
    parts = reliability_counts(probability[:cut], reference[:cut])
    parts = parts + reliability_counts(probability[cut:], reference[cut:])
    assert whole == pytest.approx(parts)
    assert whole.sum(0) == pytest.approx([30, probability.sum(), reference.sum()], rel=1e-5)
    # no binning finds less than the overall gap, and none more than the mean absolute error
    gap = abs(float(probability.mean()) - reference.mean())
    assert gap - 1e-6 <= summarise_calibration(whole)["ece"] <= abs(probability - reference).mean() + 1e-6
