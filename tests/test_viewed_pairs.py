"""Cases with two predictions, put together from two reports; and the pages of runs in a real browser."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from audit.browse import pack_case
from audit.compare import compare_runs
from audit.pages import write_index
from audit.report import write_report
from audit.results import CaseVolumes
from audit.viewed_pairs import join_pair, open_report
from runtime.files import write_json
from tests.test_pages import make_run
from tests.test_report_page import (
    NAMES,
    ODD_NAME,
    PREDICTION_RGB,
    REFERENCE_RGB,
    browser,  # noqa: F401, a fixture
    make_audit,
    open_made,
    pixels_near,
    unpack,
)

SHAPE = (6, 20, 20)
SECOND_RGB = (226, 130, 190)  # of viewer.js: the prediction of B


def pack(place: tuple[slice, ...], regions: list[str], reference: np.ndarray) -> dict[str, Any]:
    """Return a packed case whose head, and prediction in its first region, is `place`."""
    predicted = np.zeros((len(regions), *SHAPE), bool)
    predicted[(0, *place)] = True
    head = predicted[0].astype(np.float32)
    masks = np.zeros((len(regions), *SHAPE), bool)
    masks[regions.index("WT")] = reference
    case = CaseVolumes({"flair": head}, masks, {"prediction": predicted}, None, (1.0, 1.0, 1.0))
    return pack_case(case, {"key": "internal/x", "name": "x", "about": "", "notes": [], "regions": regions})


def test_two_cropped_predictions_are_laid_over_one_another() -> None:
    reference = np.zeros(SHAPE, bool)
    reference[2, 9:12, 9:12] = True
    first = pack((slice(1, 3), slice(3, 12), slice(5, 12)), ["WT"], reference)
    second = pack((slice(2, 4), slice(8, 16), slice(9, 18)), ["TC", "WT"], reference)
    pair = join_pair(first, second)
    assert (pair["layers"], pair["regions"]) == (["reference", "A", "B"], ["WT"])
    z, y, x = pair["offset"]
    masks = unpack(pair["masks"]).reshape(3, *pair["shape"])

    def whole(layer: int) -> np.ndarray:
        grid = np.zeros(SHAPE, np.uint8)
        depth, height, width = pair["shape"]
        grid[z : z + depth, y : y + height, x : x + width] = masks[layer]
        return grid

    assert np.array_equal(whole(0), reference)
    predicted = np.zeros(SHAPE, np.uint8)
    predicted[1:3, 3:12, 5:12] = 1
    assert np.array_equal(whole(1), predicted)
    assert not whole(2).any()  # the second predicts TC alone, which the first does not have
    assert pair["start"] + z in (1, 2)  # where A and B differ, all 63 voxels


def test_other_references_spacings_or_regions_are_not_laid_over_one_another() -> None:
    place = (slice(1, 3), slice(3, 12), slice(5, 12))
    reference = np.zeros(SHAPE, bool)
    reference[2, 9:12, 9:12] = True
    first = pack(place, ["WT"], reference)
    assert join_pair(first, first) is not None
    assert join_pair(first, pack(place, ["WT"], np.roll(reference, 1, 2))) is None
    assert join_pair(first, {**first, "spacing_mm": [2.0, 1.0, 1.0]}) is None
    assert join_pair(first, {**first, "regions": ["ET"]}) is None


def audit_run(folder: Path, predictions: dict[str, str]) -> Path:
    """Write the audit of a made run whose prediction of each case is that of another made case."""
    run = make_run(folder, mean=None)
    results = make_audit(run)
    rows = results.rows

    def open_case(cohort: str, case: str) -> CaseVolumes:
        return open_made(cohort, predictions[case])

    numbers = rows.set_index(["cohort", "case", "region", "mode"])
    changed = [
        numbers.loc[(row.cohort, predictions[row.case], row.region, row.mode)] for row in rows.itertuples()
    ]
    keys = ["cohort", "case", "patient", "region", "mode"]
    measured = pd.DataFrame(changed).reset_index(drop=True).drop(columns="patient")
    results = dataclasses.replace(
        results, rows=pd.concat([rows[keys], measured], axis=1), open_case=open_case
    )
    (run / "evaluation").mkdir()
    results.rows.to_csv(run / "evaluation" / "metrics_per_case.csv", index=False)
    write_json(run / "evaluation" / "summary.json", results.summary)
    write_report(run / "evaluation" / "report.html", results, {})
    return run


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two audited runs, of which B has two predictions the other way round, and the comparison."""
    folder = tmp_path_factory.mktemp("results")
    audit_run(folder / "A", {name: name for name in NAMES})
    audit_run(folder / "B", {"wrong": "right", ODD_NAME: ODD_NAME, "right": "wrong"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["final_evaluation_v2.py"])
        patch.setattr("audit.compare.refuse_leak", lambda *_: None)
        compare_runs([str(folder / "A"), str(folder / "B")], None, 0)
    return folder


def test_a_comparison_holds_the_cases_of_both_reports_in_the_order_of_change(compared: Path) -> None:
    text = (compared / "comparison_A_B" / "comparison.html").read_text(encoding="utf-8")
    names = [part.split('"')[0] for part in text.split('class="case" data-case="')[1:]]
    assert {names[0], names[1]} <= {f"{c}/{n}" for c in ("internal", "external") for n in ("wrong", "right")}
    assert len(names) == 6
    assert "<img" not in text
    # numbers that are younger than the report are of another audit
    metrics = compared / "A" / "evaluation" / "metrics_per_case.csv"
    assert open_report(compared / "A")("internal/wrong") is not None
    report = compared / "A" / "evaluation" / "report.html"
    earlier = metrics.stat().st_mtime - 5
    os.utime(report, (earlier, earlier))
    assert open_report(compared / "A")("internal/wrong") is None
    assert open_report(compared / "nowhere")("internal/wrong") is None


def watch(browser: Any, page: Path) -> tuple[Any, list[str], list[str]]:  # noqa: F811
    """Open a page; return it, and what it logs as errors and asks for."""
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    errors: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    return tab, errors, requests


def test_both_predictions_are_shown_in_one_viewer(compared: Path, browser: Any) -> None:  # noqa: F811
    page = compared / "comparison_A_B" / "comparison.html"
    tab, errors, requests = watch(browser, page)
    dot = tab.locator("a[data-open='internal/wrong'][data-region=WT]")
    dot.hover()
    figure = tab.locator("figure", has=dot)
    assert figure.locator(".said").text_content().startswith("wrong: A 0.000, B 1.000")
    dot.click()
    tab.wait_for_selector("#viewer[open] .viewer[data-case]")
    assert tab.locator(".layer b").all_text_contents() == ["reference", "A", "B"]
    assert "internal. WT Dice A 0.000, B 1.000" in tab.locator("[data-part=about]").text_content()
    # the start slice is one where A and B differ, and there is no reference where A's wrong block is
    for layer, colour in enumerate((REFERENCE_RGB, PREDICTION_RGB, SECOND_RGB)):
        for other in range(3):
            tab.locator(f"input[data-kind=contour][data-layer='{other}']").set_checked(other == layer)
        counts = tab.evaluate("() => document.querySelector('[data-part=readout]').textContent")
        is_here = float(counts.split(("reference ", "A ", "B ")[layer])[1].split()[0]) > 0
        assert (pixels_near(tab, colour) > 0) == is_here
    tab.keyboard.press("Escape")
    tab.locator("#find").fill("onerror")
    assert tab.locator("table.cases tbody tr:visible").count() == 4  # a row per cohort and region
    assert (errors, [url for url in requests if not url.startswith(("file:", "data:"))]) == ([], [])
    tab.close()


def test_two_ticked_runs_show_their_comparison_and_the_command(compared: Path, browser: Any) -> None:  # noqa: F811
    make_run(compared / "other one")
    write_index(compared)
    tab, errors, requests = watch(browser, compared / "index.html")
    for name in ("A", "B"):
        tab.locator(f"input[data-name='{name}']").check()
    assert "Compared before: A against B" in tab.locator("#compare-words").text_content()
    command = f"python final_evaluation_v2.py --compare {compared}/A {compared}/B"
    assert tab.locator("#compare-command code").text_content() == command
    tab.locator("input[data-name='other one']").check()  # A, ticked first, makes room
    assert not tab.locator("input[data-name='A']").is_checked()
    assert (
        tab.locator("#compare-command code").text_content().endswith(f"{compared}/B '{compared}/other one'")
    )
    assert tab.locator("#compare-words a").count() == 0
    tab.get_by_role("button", name="run").first.click()  # sorts
    first = tab.locator("table.runs tbody tr .name").first.text_content()
    assert first == "A"
    tab.locator("#compare-command button").click()
    tab.set_viewport_size({"width": 420, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420
    assert (errors, [url for url in requests if not url.startswith(("file:", "data:"))]) == ([], [])
    tab.close()
