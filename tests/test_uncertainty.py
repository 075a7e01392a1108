"""Whether a network knows when it fails: uncertainty per case and its rank correlation with Dice, by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from audit.measure import mean_uncertainty, measure_case, summarise_all
from audit.plots import plot_dice_against_uncertainty
from audit.report import tabulate_uncertainty
from audit.statistics import rank_correlation
from tests.test_commands import trained  # noqa: F401

SHAPE = (2, 4, 4)


def test_uncertainty_is_the_sd_over_views_in_the_predicted_mask() -> None:
    views = np.zeros((3, *SHAPE), np.float32)
    prediction, brain = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    brain[0] = prediction[0, 0, :2] = True
    views[:, 0, 0, 0] = 0.6, 0.9, 0.9  # variance 0.02
    views[:, 0, 0, 1] = 0.7, 0.7, 0.7
    views[:, 1, 0, 0] = 0.0, 1.0, 0.0  # outside of both
    assert mean_uncertainty(views, prediction, brain) == pytest.approx(np.sqrt(0.02) / 2)
    nothing = np.zeros(SHAPE, bool)
    assert mean_uncertainty(views, nothing, brain) == pytest.approx(np.sqrt(0.02) / 16)
    assert np.isnan(mean_uncertainty(views, nothing, nothing))
    widest = np.array([0.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    assert mean_uncertainty(widest, *np.ones((2, 1, 1, 1), bool)) == pytest.approx(0.4714, abs=1e-4)


def test_rank_correlation_by_hand() -> None:
    # ranks 1 2 3 4 against 4 3 1 2: 1 - 6 * (9 + 1 + 4 + 4) / (4 * 15)
    assert rank_correlation([1, 2, 5, 9], [0.9, 0.8, 0.1, 0.3]) == {"spearman": pytest.approx(-0.8), "n": 4}
    assert rank_correlation([1, 2, np.nan, 3], [3, 2, 7, 1]) == {"spearman": pytest.approx(-1), "n": 3}
    assert rank_correlation([1, 2], [2, 1]) == {"spearman": None, "n": 2}
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == {"spearman": None, "n": 3}


def make_rows() -> pd.DataFrame:
    """Rows of four cases whose masks shrink as their uncertainty grows; plain has none."""
    reference = np.ones(SHAPE, bool)
    rows = []
    for case, (width, uncertainty) in enumerate(((4, 0.1), (3, 0.2), (2, 0.3), (0, 0.25))):
        prediction = np.zeros(SHAPE, bool)
        prediction[:, :, :width] = True
        for mode in ("plain", "tta"):
            row = {
                "cohort": "internal",
                "case": str(case),
                "patient": str(case),
                "region": "WT",
                "mode": mode,
            }
            row |= measure_case(reference, prediction, (1, 1, 1))
            rows.append(row | {"uncertainty": uncertainty if mode == "tta" else np.nan})
    return pd.DataFrame(rows)


def test_summary_table_and_plot_have_the_correlation(tmp_path: Path) -> None:
    rows = make_rows()
    cohorts = summarise_all(rows, ["WT"], 0)
    # Dice ranks 4 3 2 1 against 1 2 4 3
    assert cohorts["internal"]["WT"]["uncertainty_and_dice"] == {"spearman": pytest.approx(-0.8), "n": 4}
    table = tabulate_uncertainty({"cohorts": cohorts})
    assert table.iloc[0].tolist() == ["internal", "WT", "4", "-0.800"]
    plot_dice_against_uncertainty(tmp_path / "plot.png", rows, cohorts, "")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    # audits of earlier versions have no such column
    before = summarise_all(rows.drop(columns="uncertainty"), ["WT"], 0)
    assert "uncertainty_and_dice" not in before["internal"]["WT"]


def test_an_audit_says_it_per_case_and_in_its_summary(trained: Path) -> None:  # noqa: F811
    folder = trained / "results" / "tiny" / "evaluation"
    rows = pd.read_csv(folder / "metrics_per_case.csv")
    with_tta = rows[rows["mode"] == "tta"]
    assert with_tta["uncertainty"].between(0, 0.4715).all()
    assert with_tta["uncertainty"].max() > 0
    assert rows.loc[rows["mode"] == "plain", "uncertainty"].isna().all()
    summary = json.loads((folder / "summary.json").read_text())
    external = with_tta[with_tta["cohort"] == "external"]
    expected = external["uncertainty"].corr(external["dice"], method="spearman")
    found = summary["cohorts"]["external"]["WT"]["uncertainty_and_dice"]
    assert found["n"] == 3
    assert found["spearman"] is None if np.isnan(expected) else found["spearman"] == pytest.approx(expected)
    assert summary["cohorts"]["internal"]["WT"]["uncertainty_and_dice"] == {"spearman": None, "n": 1}
    assert (folder / "dice_against_uncertainty.png").is_file()
    assert "Does the network know when it fails?" in (folder / "report.html").read_text()
