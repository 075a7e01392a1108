"""The audit's page: what is in it, how large it may be, and, in a real browser, what it does."""

import base64
import dataclasses
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from audit import browse, report
from audit.browse import embed_cases, keep_prediction, list_notes, open_cases, order_cases, pack_case
from audit.headline import describe_errors, find_worst, make_cards, write_sentences
from audit.measure import measure_case, summarise_all
from audit.plots import plot_dice_per_case
from audit.report import write_report
from audit.results import AuditResults, CaseVolumes
from audit.statistics import reliability_counts, summarise_calibration
from cohort.cache import prepare_cases
from cohort.layouts import CaseSource, find_cases
from utils_v2 import THRESHOLDS

SHAPE, SPACING_MM = (24, 20, 16), (3.0, 1.0, 2.0)
ODD_NAME = "<img src=x onerror=\"window.hit='name'\"></script><script>window.hit='script'</script>$x_$"
NAMES = ("wrong", ODD_NAME, "right")


def block(*place: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[place] = True
    return mask


REFERENCE = block(slice(8, 14), slice(5, 12), slice(4, 10))
PREDICTIONS = {  # at one place too much, at another too little
    "wrong": block(slice(15, 17), slice(5, 12), slice(4, 10)),
    ODD_NAME: block(slice(8, 12), slice(5, 12), slice(4, 10)),
    "right": REFERENCE,
}


def open_made(_cohort: str, case: str, modalities: tuple[str, ...] = ("flair",)) -> CaseVolumes:
    """Return a head in the middle of the grid, brighter in the tumour, with regions WT and TC."""
    head = block(slice(1, 23), slice(2, 18), slice(2, 14)).astype(np.float32)
    masks = PREDICTIONS[case]
    inner = block(slice(10, 12), slice(7, 9), slice(6, 8))
    return CaseVolumes(
        dict.fromkeys(modalities, head * (1 + REFERENCE)),
        np.stack([REFERENCE, REFERENCE & inner]),
        {"prediction": np.stack([masks, masks & inner])},
        np.stack([masks, masks & inner]).astype(np.uint8) * browse.PROBABILITY_STEPS,
        SPACING_MM,
    )


def make_audit(run: Path, names: tuple[str, ...] = NAMES, **changes: Any) -> AuditResults:
    """Return an audit of cohorts internal and external over made cases, with regions WT and TC."""
    rows = []
    for cohort in ("validation", "internal", "external"):
        for case in names:
            volumes = open_made(cohort, case)
            for index, region in enumerate(("WT", "TC")):
                for mode in ("plain", "tta"):
                    row = {"cohort": cohort, "case": case, "patient": case, "region": region, "mode": mode}
                    row |= {"seen_in_training": False, "uncertainty": 0.1 if mode == "tta" else np.nan}
                    masks = volumes.reference[index], volumes.predictions["prediction"][index]
                    rows.append(row | measure_case(*masks, SPACING_MM))
    table = pd.DataFrame(rows)
    bins = reliability_counts(np.full(SHAPE, 0.4), REFERENCE)
    calibration = {mode: summarise_calibration(bins) for mode in ("plain", "tta")}
    summary = {
        "data_kind": "phantom",
        "seen_in_training": {"internal": {"cases": 3, "seen": 0, "unseen": 3}},
        "cohorts": summarise_all(table, ["WT", "TC"], 0),
        "calibration": {"WT": calibration, "TC": calibration},
        "postprocessing": None,
        "threshold": {"WT": 0.35, "TC": 0.5},
        "command": "python final_evaluation_v2.py",
        "checkpoint_sha256": "c0ffee",
        "split_sha256": "5eed",
        "hardware": {"device": "cpu"},
        "versions": {"torch": "2.9"},
    }
    counts = {cohort: np.ones((2, len(THRESHOLDS), 3), np.int64) for cohort in ("validation", "internal")}
    leakage = pd.DataFrame(columns=["cohort", "case"])
    return AuditResults(run, summary | changes, table, leakage, counts, open_made)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a report with a page per case, with one case that has markup for a name."""
    folder = tmp_path_factory.mktemp("audit")
    results = make_audit(folder / "run")
    tested = results.rows[results.rows["cohort"] != "validation"]
    chart = folder / "dice_per_case.png"
    plot_dice_per_case(chart, tested, results.summary["cohorts"], "")
    write_report(folder / "report.html", results, {"Dice of each case.": chart}, "all")
    return folder


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)


# ------------------------------------------------------------------------------------------------------------
# Which cases, and their volumes
# ------------------------------------------------------------------------------------------------------------


def test_best_median_worst_come_first_and_then_the_largest_errors() -> None:
    rows = pd.DataFrame(
        {
            "cohort": cohort,
            "case": f"{cohort}{i}",
            "region": "WT",
            "mode": "tta",
            "dice": dice,
            "fp": fp,
            "fn": 0,
        }
        for cohort in ("validation", "internal", "external_unseen")
        for i, (dice, fp) in enumerate([(0.9, 1), (0.8, 99), (0.7, 2), (0.3, 3), (0.6, 4), (0.2, 5)])
    )
    # best 0, median (4th of 6) 4, worst 5; then in turns lowest Dice (5, 3, ...) and most wrong (1, ...)
    assert order_cases(rows) == [("internal", f"internal{i}") for i in (0, 4, 5, 1, 3, 2)]


def test_a_packed_case_holds_its_voxels_and_starts_where_most_is_wrong() -> None:
    case = pack_case(open_made("internal", ODD_NAME), {"key": "k"})
    # the head, 2 voxels of margin: slices 0 to 23, rows 0 to 19, columns 0 to 15
    assert (case["offset"], case["shape"]) == ([0, 0, 0], list(SHAPE))
    assert case["start"] == 12  # slices 12 and 13 are missed
    masks = unpack(case["masks"]).reshape(2, *SHAPE)
    volumes = open_made("internal", ODD_NAME)
    for layer, regions in zip(masks, (volumes.reference, volumes.predictions["prediction"]), strict=True):
        assert np.array_equal(layer & 1 > 0, regions[0])
        assert np.array_equal(layer & 2 > 0, regions[1])
    image = unpack(case["images"][0]["voxels"]).reshape(SHAPE)
    assert (image[0, 0, 0], image[2, 3, 3], image[9, 6, 5]) == (0, 128, 255)  # around, head, tumour
    assert np.array_equal(unpack(case["probability"]).reshape(2, *SHAPE), volumes.probability)
    assert pack_case(open_made("internal", "right"), {})["start"] == 8  # nothing wrong: most reference


def test_a_case_is_cropped_to_what_there_is_to_see() -> None:
    small = open_made("internal", "right")._replace(images={"flair": REFERENCE.astype(np.float32)})
    case = pack_case(small, {})
    assert case["offset"] == [6, 3, 2]  # 2 voxels of margin
    assert case["shape"] == [10, 11, 10]
    assert case["start"] + case["offset"][0] == 8
    empty = np.zeros((1, *SHAPE), bool)
    nothing = CaseVolumes(
        {"flair": np.zeros(SHAPE, np.float32)}, empty, {"prediction": empty}, None, SPACING_MM
    )
    case = pack_case(nothing, {})
    assert (case["shape"], case["start"], case["probability"]) == (list(SHAPE), 12, "")


def test_a_page_stays_below_its_limit_and_first_modalities_come_first() -> None:
    keys = [("internal", name) for name in NAMES]

    def open_four(cohort: str, case: str) -> CaseVolumes:
        return open_made(cohort, case, ("flair", "t1", "t1ce", "t2"))

    def embed(budget: int) -> dict:
        return embed_cases(keys, lambda cohort, case: {"key": f"{cohort}/{case}"}, open_four, budget)

    one = browse.size_of(pack_case(open_four(*keys[0]), {}, first_only=True))
    whole = browse.size_of(pack_case(open_four(*keys[0]), {}))
    assert [len(case["images"]) for case in embed(10**6).values()] == [4, 4, 4]
    assert list(embed(one)) == keys[:1]
    assert list(embed(one - 1)) == []
    assert [len(case["images"]) for case in embed(3 * one + whole - one + 200).values()] == [4, 1, 1]


def test_kept_predictions_come_back_with_the_volumes_of_the_cache(
    phantom_cohort: Path, tmp_path: Path
) -> None:
    (case,) = prepare_cases(find_cases_in(phantom_cohort)[:1], ("flair", "t1"), ("WT", "TC"), str(tmp_path))
    probabilities = np.random.default_rng(0).random((2, *case.shape), np.float32)
    masks = probabilities > 0.5
    kept = {"internal": {case.case_id: keep_prediction(masks, probabilities)}}
    volumes = open_cases({"internal": [case]}, kept, ("flair", "t1"))("internal", case.case_id)
    assert np.array_equal(volumes.predictions["prediction"], masks)
    assert np.allclose(volumes.probability / browse.PROBABILITY_STEPS, probabilities, atol=0.0251)
    assert np.array_equal(volumes.images["t1"], case.volume[1])
    assert np.array_equal(volumes.reference, case.reference)


def find_cases_in(folder: Path) -> list:
    return find_cases(CaseSource(str(folder)), ("flair", "t1"))


def test_notes_say_what_is_assumed_and_what_leaked(phantom_cohort: Path, tmp_path: Path) -> None:
    first, second = prepare_cases(find_cases_in(phantom_cohort)[:2], ("flair",), ("WT",), str(tmp_path))
    first = dataclasses.replace(first, spacing_known=False, warnings=("odd",))
    leakage = pd.DataFrame(
        [{"cohort": "external", "case": second.case_id, "evidence": "near image", "training_case": "other"}]
    )
    shapes = []
    notes = list_notes(
        {"validation": [first], "external": [first, second]},
        leakage,
        lambda shape, _: shapes.append(shape) or ["far"],
    )
    assert set(notes) == {("external", first.case_id), ("external", second.case_id)}  # what is tested alone
    assert shapes == [first.shape[1:], second.shape[1:]]
    assert "far" in notes["external", first.case_id]
    assert notes["external", first.case_id][0] == browse.SPACING_ASSUMED
    assert "odd" in notes["external", first.case_id]
    assert notes["external", second.case_id][0].startswith("near image: same scan, verified, other of")


# ------------------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------------------


def test_the_headline_is_that_of_the_summary_with_n_and_no_interval_of_few() -> None:
    summary = make_audit(Path("run")).summary
    cards = make_cards(summary)
    assert [(card.cohort, card.region) for card in cards] == [
        ("internal", "WT"), ("internal", "TC"), ("external", "WT"), ("external", "TC"),
    ]  # fmt: skip
    # WT: 0 beside it, 4 of 6 slices are Dice 0.8, and 1
    assert (cards[0].mean, cards[0].median, cards[0].spread) == (
        "0.600",
        "0.800",
        "range 0.000 to 1.000, n = 3",
    )
    assert cards[0].count == "3 cases of 3 patients"
    assert (cards[0].is_clean, cards[2].is_clean) == (True, None)
    summary["seen_in_training"]["external"] = {"cases": 3, "seen": 2, "unseen": 1}
    assert make_cards(summary)[2].held_out == "2 of 3 cases seen in training or validation"
    sentences = write_sentences(summary)
    assert list(sentences) == ["TTA", "Calibration", "Lesions", "Volume bias"]
    # one lesion per reference, which dilated by 3 the prediction beside it touches; TC is too small for one
    assert sentences["Lesions"].startswith("3 of 3 found and 0 false in internal WT; 0 of 0 found")
    assert sentences["TTA"].startswith("changes Dice per case by +0.0000 in internal WT (range +0.0000 to")


@pytest.mark.parametrize(
    ("reference_ml", "prediction_ml", "tp", "fp", "fn", "words"),
    [
        (10, 0, 0, 0, 10, "nothing predicted where the reference has 10.0 ml"),
        (0, 5, 0, 5, 0, "5.0 ml predicted where the reference is empty"),
        (10, 5, 0, 5, 10, "5.0 ml predicted beside the 10.0 ml of the reference"),
        (
            10,
            5,
            4,
            1,
            6,
            "misses TC: 86% of its wrong voxels are missed TC (predicts 5.0",
        ),
        (
            10,
            25,
            9,
            16,
            1,
            "predicts too much: 94% of its wrong voxels are no TC (predicts 25.0",
        ),
        (
            10,
            10,
            5,
            5,
            5,
            "50% of its wrong voxels are missed TC, 50% too much (predicts 10.0 ml, the reference has",
        ),
        (10, 10, 10, 0, 0, "no wrong voxel"),
    ],
)
def test_the_page_says_why_a_case_failed(
    reference_ml: float, prediction_ml: float, tp: int, fp: int, fn: int, words: str
) -> None:
    row = {"reference_ml": reference_ml, "prediction_ml": prediction_ml, "tp": tp, "fp": fp, "fn": fn}
    assert describe_errors(row | {"region": "TC", "lesions_fn": 0, "lesions_fp": 0}).startswith(words)


def test_the_worst_case_of_each_cohort_is_named() -> None:
    worst = find_worst(make_audit(Path("run")).rows)
    assert [(each.cohort, each.region, each.case, each.dice) for each in worst] == [
        ("internal", "WT", "wrong", "0.000"), ("internal", "TC", "wrong", "0.000"),
        ("external", "WT", "wrong", "0.000"), ("external", "TC", "wrong", "0.000"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# The page as text
# ------------------------------------------------------------------------------------------------------------


def test_names_are_escaped_everywhere_and_pages_are_numbers(pages: Path) -> None:
    text = (pages / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "<script>window" not in text
    assert sorted(page.name for page in (pages / "cases").glob("*.html")) == [
        f"000{i}.html" for i in range(1, 7)
    ]
    scripts = re.findall(r'<script type="application/json" class="case"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert {json.loads(script)["name"] for script in scripts} == set(NAMES)
    for drawing in pages.glob("*.svg"):
        assert "<img" not in drawing.read_text(encoding="utf-8")
    assert "shows patients" not in text


def test_circles_lie_on_the_dots_of_the_chart(pages: Path) -> None:
    text = (pages / "dice_per_case.svg").read_text(encoding="utf-8")
    marks = np.array(re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', text), float)
    circles = np.array(re.findall(r'<circle [^<]*cx="([\d.]+)" cy="([\d.]+)"', text), float)
    assert len(circles) == 12  # 3 cases of 2 cohorts and regions
    distances = np.linalg.norm(circles[:, None] - marks[None], axis=-1)
    assert (distances.min(1) < 0.1).all()


def test_a_page_of_real_data_says_that_it_shows_patients(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_audit(tmp_path / "run", data_kind="real"), {})
    assert "This page shows patients" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_does_not_fit_is_not_embedded_and_old_case_pages_go(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pages, tmp_path / "audit")
    (tmp_path / "audit" / "cases" / "2 notes.html").touch()
    monkeypatch.setattr(report, "PAGE_BYTES", report.PAGE_OVERHEAD)
    write_report(tmp_path / "audit" / "report.html", make_audit(tmp_path / "run"), {})
    text = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    assert 'class="case"' not in text
    assert "6 of\n6 cases are not embedded" in text
    # they showed the masks of another audit; what somebody else put there stays
    assert [page.name for page in (tmp_path / "audit" / "cases").glob("*.html")] == ["2 notes.html"]


# ------------------------------------------------------------------------------------------------------------
# The page in a browser
# ------------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: requirements-dev.txt has it")
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium to test the page in one")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, pages: Path) -> Iterator[Any]:
    """The report in a browser; in the end nothing was logged as an error and nothing was asked for."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    tab = context.new_page()
    errors, requests = [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((pages / "report.html").as_uri())
    yield tab
    assert tab.evaluate("window.hit") is None
    assert errors == []
    assert all(url.startswith((pages.as_uri(), "data:")) and url.count("#") <= 1 for url in requests), (
        requests
    )
    context.close()


def pixels_near(page: Any, colour: tuple[int, int, int], canvas: str = "[data-cut=axial]") -> int:
    """Return how many pixels of a canvas are near a colour."""
    return page.evaluate(
        """([selector, colour]) => {
            const canvas = document.querySelector(selector);
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let count = 0;
            for (let i = 0; i < data.length; i += 4) {
                count += colour.every((value, channel) => Math.abs(data[i + channel] - value) < 25);
            }
            return count;
        }""",
        [canvas, list(colour)],
    )


REFERENCE_RGB, PREDICTION_RGB = (86, 180, 233), (240, 160, 20)


def open_case(page: Any, name: str) -> None:
    page.evaluate(
        """name => [...document.querySelectorAll("#case-table .open")]
            .find(button => button.textContent === name).click()""",
        name,
    )
    page.locator(".viewer[data-case]").wait_for()


def test_the_table_sorts_searches_and_shows_one_region(page: Any) -> None:
    def shown() -> list[str]:
        return page.evaluate(
            """[...document.querySelectorAll("#case-table tbody tr:not([hidden])")]
                .map(row => row.cells[3].textContent)"""
        )

    assert shown() == ["0.000", "0.000", "0.800", "0.800", "1.000", "1.000"]  # WT alone, the lowest first
    header = page.locator("#case-table th", has_text="Dice")
    header.locator("button").click()
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert shown() == ["1.000", "1.000", "0.800", "0.800", "0.000", "0.000"]
    page.fill("#search", "onerror")
    assert shown() == ["0.800", "0.800"]
    page.select_option("#cohort", "external")
    assert shown() == ["0.800"]
    assert "1 of" in page.text_content("#count")


def test_a_dot_says_its_case_and_opens_it(page: Any) -> None:
    dot = page.locator('circle.dot[data-case="internal/wrong"]').first
    dot.scroll_into_view_if_needed()
    dot.hover()
    assert page.text_content("#hint") == "wrong, internal: WT Dice 0.000"
    dot.click()
    page.locator(".viewer[data-case='internal/wrong']").wait_for()
    assert page.text_content("#viewer-name") == "wrong"
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()


def test_the_viewer_scrolls_by_wheel_keys_and_slider_and_its_strip_seeks(page: Any) -> None:
    open_case(page, ODD_NAME)
    slider = page.locator("[data-part=slice]")
    assert slider.input_value() == "12"  # most is wrong there
    axial = page.locator("[data-cut=axial]")
    axial.hover()
    for _ in range(10):
        page.mouse.wheel(0, 100)
    page.locator("[data-part=readout]", has_text="slice 22 (shown").wait_for()
    axial.press("ArrowDown")
    assert slider.input_value() == "21"
    slider.press("ArrowLeft")
    assert slider.input_value() == "20"
    assert "axial slice 20 (shown: 0 to 23): reference 0.0 cm\u00b2" in page.text_content(
        "[data-part=readout]"
    )
    strip = page.locator(".strip").bounding_box()
    page.mouse.click(strip["x"] + strip["width"] * 8.5 / 24, strip["y"] + 5)
    # 7 x 6 voxels of 1 x 2 mm
    assert page.text_content("[data-part=readout]") == (
        "axial slice 8 (shown: 0 to 23): reference 0.8 cm\u00b2, prediction 0.8 cm\u00b2"
    )


def test_masks_errors_and_probability_are_switched(page: Any) -> None:
    open_case(page, ODD_NAME)  # at slice 12, where the reference alone is
    assert pixels_near(page, REFERENCE_RGB) > 100
    assert pixels_near(page, PREDICTION_RGB) == 0
    page.locator("[data-kind=contour][data-layer='0']").uncheck()
    assert pixels_near(page, REFERENCE_RGB) == 0
    page.keyboard.press("e")  # errors alone: missed, in the reference's colour
    area = page.evaluate("(c => c.width * c.height)(document.querySelector('[data-cut=axial]'))")
    missed = pixels_near(page, REFERENCE_RGB) / area
    if missed == 0:  # translucent over a bright tumour
        missed = pixels_near(page, (109, 190, 236)) / area
    assert missed == pytest.approx(42 / (20 * 16), rel=0.1)
    page.keyboard.press("e")
    assert pixels_near(page, (109, 190, 236)) == 0
    page.locator("[data-part=slice]").fill("9")
    before = pixels_near(page, (255, 255, 255))
    page.keyboard.press("p")
    assert pixels_near(page, (255, 255, 255)) < before  # the heat map lies over the bright tumour
    page.select_option("[data-part=region]", "TC")
    assert "reference 0.0 cm" in page.text_content("[data-part=readout]")


def test_cuts_have_the_true_aspect_and_dragging_sets_the_window(page: Any) -> None:
    open_case(page, "right")
    for cut, aspect in (("axial", 32 / 20), ("coronal", 32 / 72), ("sagittal", 20 / 72)):
        box = page.locator(f"[data-cut={cut}]").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(aspect, rel=0.02)
    box = page.locator("[data-cut=axial]").bounding_box()
    centre = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    bright = pixels_near(page, (255, 255, 255))
    page.mouse.move(*centre)
    page.mouse.down()
    page.mouse.move(centre[0] + 300, centre[1], steps=3)
    page.mouse.up()
    assert pixels_near(page, (255, 255, 255)) < bright  # a wider window is greyer
    page.keyboard.press("r")
    assert pixels_near(page, (255, 255, 255)) == bright


@pytest.mark.parametrize("width", [420, 1400])
def test_the_page_needs_no_scrolling_sideways(browser: Any, pages: Path, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto((pages / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()


def test_the_page_of_a_case_shows_it(browser: Any, pages: Path) -> None:
    tab = browser.new_page()
    tab.goto((pages / "report.html").as_uri())
    with tab.expect_navigation():
        tab.locator("#case-table a.page").first.click()
    tab.locator(".viewer[data-case]").wait_for()
    assert pixels_near(tab, REFERENCE_RGB) > 100  # the reference alone is there
    assert tab.evaluate("window.hit") is None
    tab.close()
