"""Pages of runs, of all runs and of comparisons, and model cards: what they say and what they survive."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from audit import pages
from audit.compare import compare_runs
from audit.comparison_page import draw_scatter
from audit.model_card import as_block, as_code, make_card
from audit.pages import write_index, write_run_pages
from audit.runs import read_run
from cohort.selection import TrainingSource
from cohort.split import split_sha256
from dataset_balance_v2 import balance_shares, balance_slices
from runtime.checkpoints import save_checkpoint
from runtime.command import to_plain
from runtime.files import file_sha256, write_json
from tests.test_compare import CASES, write_run
from training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
ODD = "<img src=x onerror=alert(1)> & 'x' `b` | \"q\""


def dice(mean: float, n: int) -> dict[str, Any]:
    """A Dice as the audit sums it up, over n cases."""
    ci95 = [mean - 0.05, mean + 0.05] if n >= 6 else None
    spread = {"range": [mean - 0.1, mean + 0.1], "ci95": ci95}
    return {"mean": mean, "sd": 0.1, "median": mean + 0.01, **spread, "n": n, "n_undefined": 0}


def make_run(folder: Path, mean: float | None = 0.8, n: int = 7, kind: str = "phantom") -> Path:
    """Write a run folder without pictures; with a mean Dice it is audited."""
    parts = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["secret_case", "e"]}
    write_json(folder / "split.json", {"seed": 3, **parts, "sha256": split_sha256(parts)})
    config = {"data_dir": "data/x", "modalities": ["flair"], "regions": ["WT"], "epochs": 9, "context": 1}
    config |= {
        "command": "python train_drunet_v2.py --run `x`",
        "data_kind": kind,
        "held_out": ["secret_case"],
        "joined_patients": {"secret_case": "secret_case_again"},
    }
    config |= {"split_patients": {"train": 2, "validation": 1, "test": 2}, "skipped": []}
    write_json(folder / "config.json", config)
    (folder / "log.csv").write_text(
        "epoch,minutes,learning_rate,train_loss,validation_dice_WT\n1,1,1e-3,0.9,0.2\n2,2.5,1e-3,0.5,0.7\n"
    )
    content = {"model": {"w": torch.zeros(1)}, "epoch": 2, "validation_dice": 0.7, "thresholds": [0.4]}
    save_checkpoint(folder / "best.pt", content | {"postprocessing": None, "data_kind": kind})
    if mean is not None:
        scores = {"dice": dice(mean, n), "n_cases": n, "n_patients": n}
        summary = {"data_kind": kind, "cohorts": {"validation": {"WT": {"tta": scores}}}}
        summary["cohorts"]["internal"] = {"WT": {"plain": scores, "tta": scores}}
        summary |= {"seen_in_training": {}, "checkpoint_sha256": file_sha256(folder / "best.pt")}
        write_json(folder / "evaluation" / "summary.json", summary)
    return folder


class Reader(HTMLParser):
    """Collects what a browser would see: tags, links and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and its link."""
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        """Add text."""
        self.words += data + " "

    @property
    def text(self) -> str:
        """The text, spaces joined."""
        return " ".join(self.words.split())


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_says_what_came_out_and_names_no_case(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", n=7)
    (run / "balance.csv").write_text("kind,slices,stored,drawn\ntumour,30,0.3,0.5\nbrain,70,0.7,0.5\n")
    write_run_pages(run)
    page = Reader(run / "index.html")
    assert "0.800 95 % CI 0.750 to 0.850 median 0.810, 7 cases of 7 patients" in page.text
    assert "Synthetic phantoms, not a BraTS result." in page.text
    assert "epochs 2 of 9" in page.text
    assert "validation Dice 0.700" in page.text
    for row in ("train 3 2 50 %", "validation 1 1 17 %", "test 2 2 33 %"):  # cases, patients, share of cases
        assert row in page.text
    assert "tumour 30 30.0 % stored 50.0 % drawn" in page.text
    assert "1 cases were kept for another test." in page.text
    assert file_sha256(run / "best.pt") in page.text
    text = (run / "index.html").read_text() + (run / "MODEL_CARD.md").read_text()
    assert "secret_case" not in text
    assert not any(re.match(r"https?:|//", link) for link in page.links)


def test_a_run_of_few_patients_has_a_range_even_where_its_audit_wrote_an_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", n=5)
    path = run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    summary["cohorts"]["internal"]["WT"]["tta"]["dice"] = {**dice(0.8, 5), "ci95": [0.7, 0.9]}
    write_json(path, summary)
    assert read_run(run).headlines[0].spread == "range 0.700 to 0.900, n = 5"


def test_the_audit_of_an_earlier_checkpoint_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    content = {"model": {"w": torch.ones(1)}, "epoch": 5, "validation_dice": 0.9, "postprocessing": None}
    save_checkpoint(run / "best.pt", content)
    later = (run / "evaluation" / "summary.json").stat().st_mtime + 5
    os.utime(run / "best.pt", (later, later))
    write_run_pages(run)
    for path in (run / "index.html", run / "MODEL_CARD.md", tmp_path / "index.html"):
        assert "0.800" not in path.read_text()
        assert "The audit is of an earlier best.pt" in path.read_text()
    # a copy is younger too, and the same
    same = make_run(tmp_path / "same")
    os.utime(same / "best.pt", (later, later))
    assert read_run(same).state == "audited"


def test_a_page_that_cannot_be_written_costs_no_run(tmp_path: Path, monkeypatch, caplog) -> None:
    run = make_run(tmp_path / "r")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no template")

    monkeypatch.setattr(pages, "write_page", fail)
    monkeypatch.setattr(pages, "make_card", fail)
    with caplog.at_level("WARNING", "drunet"):
        write_run_pages(run)
    assert [record.levelname for record in caplog.records].count("WARNING") == 3
    assert not list(tmp_path.rglob("*.html"))
    write_run_pages(tmp_path / "nowhere" / "r")


def test_files_that_a_person_wrote_or_changed_are_kept(tmp_path: Path, caplog) -> None:
    run = make_run(tmp_path / "r")
    (tmp_path / "index.html").write_text("my own page")
    write_run_pages(run)
    card = (run / "MODEL_CARD.md").read_text().replace("license: other", "license: mit")
    (run / "MODEL_CARD.md").write_text(card)
    before = (run / "index.html").stat().st_mtime_ns
    write_run_pages(run)
    assert (run / "MODEL_CARD.md").read_text() == card
    assert (tmp_path / "index.html").read_text() == "my own page"
    assert (run / "index.html").stat().st_mtime_ns > before  # ours is written again
    assert "MODEL_CARD.md is not as this program wrote it and is kept" in caplog.text


# ------------------------------------------------------------------------------------------------------------
# Model card
# ------------------------------------------------------------------------------------------------------------


def test_a_card_has_the_front_matter_that_hubs_read_and_numbers_with_their_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / ODD.replace("/", "_"), kind="real")
    write_run_pages(run)
    _, front, body = (run / "MODEL_CARD.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert (metadata["license"], metadata["library_name"]) == ("other", "pytorch")
    assert metadata["metrics"] == ["dice"]
    (model,) = metadata["model-index"]
    assert model["name"] == run.name
    (result,) = model["results"]  # validation chose, so it is no result
    assert result["task"]["type"] == "image-segmentation"
    assert result["dataset"] == {"type": "internal", "name": "held-out test patients (patients)"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("dice", 0.8)
    assert metric["name"].endswith("mean over 7 cases of 7 patients: 95 % CI 0.750 to 0.850")
    assert "| 0.800 | 95 % CI 0.750 to 0.850 | 0.810 | 7 / 7 | yes |" in body
    assert "| test | 2 | 2 |" in body
    assert file_sha256(run / "best.pt") in body
    assert "\n````\n" not in body
    assert "```\npython train_drunet_v2.py --run `x`\n```" in body
    unaudited = make_run(tmp_path / "plain", mean=None)
    write_run_pages(unaudited)
    text = (unaudited / "MODEL_CARD.md").read_text()
    assert "model-index" not in text
    assert "Not audited yet" in text
    assert "synthetic-data" in text


def test_a_card_lists_every_setting_that_makes_another_network(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    config = json.loads((run / "config.json").read_text())
    settings = to_plain(TrainConfig(keep="last", source=TrainingSource(cohort_weights=(1.0, 2.0))))
    write_json(run / "config.json", config | settings | {"se_form": "slab", "data_dir": "secret_folder"})
    card = make_card(read_run(run))
    listed = set(re.findall(r"^\| `(\w+)` \|", card.partition("## Settings")[2], re.MULTILINE))
    places = {"run", "results_dir", "resume", "config", "data_dir", "hold_out_dir", "mapping", "split"}
    places |= {"different", "cache_dir"}
    machine = {"preset", "fold", "device", "workers", "compile", "checkpointing", "probe", "rate_since"}
    assert listed == set(settings) - places - machine
    assert "| `cohort_weights` | `1.0 2.0` |" in card
    assert "| `init` | `none` |" in card
    assert (
        "The last epoch (2) was kept. One validation case chooses no threshold (WT 0.40). Post-processing "
        "was chosen on validation. Dice there was 0.700, mean over regions and 1 case," in card
    )
    assert "means over the whole slab" in card
    write_json(run / "config.json", config | settings)
    write_run_pages(run)
    assert "means over the whole slab" not in (run / "MODEL_CARD.md").read_text()
    assert (
        "Threshold and post-processing are chosen on these cases, so it is no result."
        in Reader(run / "index.html").text
    )


def test_a_run_on_several_cohorts_shows_its_number_on_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", n=9)
    path = run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    scores = {
        name: {"dice": dice(mean, n), "n_cases": n, "n_patients": n}
        for name, mean, n in (("a", 0.9, 6), ("b", 0.6, 3))
    }
    summary["by_source"] = {"internal": {name: {"WT": {"tta": each}} for name, each in scores.items()}}
    summary["by_source"]["validation"] = {"c": {"WT": {"tta": scores["a"]}}}
    write_json(path, summary)
    write_run_pages(run)
    card, page = (run / "MODEL_CARD.md").read_text(), Reader(run / "index.html").text
    assert "| internal, `a` alone | `WT` | 0.900 | 95 % CI 0.850 to 0.950 | 0.910 | 6 / 6 | yes |" in card
    assert (
        "| internal, `b` alone | `WT` | 0.600 | range 0.500 to 0.700, n = 3 | 0.610 | 3 / 3 | yes |" in card
    )
    assert "- 3 patients in the smallest test above" in card
    assert "those of b alone, WT: 0.600, range 0.500 to 0.700, n = 3" in page
    assert "those of c alone" not in page


def test_code_in_markdown_ends_where_it_should() -> None:
    assert as_code("a`b") == "``a`b``"
    assert as_code("`a") == "`` `a ``"
    assert as_code(["a", 1]) == "`a 1`"
    assert as_code("a|b\nc") == "`a\\|b c`"
    assert as_block("x ``` y") == "````\nx ``` y\n````"


# ------------------------------------------------------------------------------------------------------------
# All runs
# ------------------------------------------------------------------------------------------------------------


def test_all_runs_are_listed_newest_first_whatever_is_in_their_folders(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for age, (name, mean) in enumerate((("new", 0.7), ("old", 0.6), ("going", None), (ODD, 0.5))):
        run = make_run(results / name, mean)
        os.utime(run / "best.pt", (1e9 - age, 1e9 - age))
    (results / "going" / "best.pt").unlink()
    damage = {
        "cut": ("evaluation/summary.json", '{"cohorts": {"intern'),
        "list": ("evaluation/summary.json", "[]"),
        "numbers": ("evaluation/summary.json", '{"cohorts": {"internal": {"WT": {"tta": {"dice": 3}}}}}'),
        "nan": (
            "evaluation/summary.json",
            '{"cohorts": {"internal": {"WT": {"tta": {"dice": {"mean": NaN}}}}}}',
        ),
        "null": ("evaluation/summary.json", '{"cohorts": null, "seen_in_training": 7}'),
        "checkpoint": ("best.pt", "no checkpoint"),
        "split": ("split.json", '{"train": 1}'),
        "log": ("log.csv", "a,b\n1,2\n"),
        "binary": ("config.json", "\x00\x01"),
        "patients": ("config.json", '{"split_patients": 4, "modalities": 3, "epochs": {}}'),
    }
    for name, (path, text) in damage.items():
        (make_run(results / name) / path).write_text(text)
    (results / "empty").mkdir()
    (results / "some.txt").write_text("x")
    write_index(results)
    page = Reader(results / "index.html")
    order = [page.text.index(f" {name} ") for name in ("new", "old")]
    assert order == sorted(order)
    assert "0.700 internal WT 95 % CI 0.650 to 0.750, n = 7" in page.text
    assert ODD in page.text
    assert "img" not in page.tags
    assert "going unfinished 2 of 9 epochs, 2.5 min" in page.text
    for name in damage:
        assert re.search(rf" {name} broken ", page.text), name
    assert " empty " not in page.text
    write_run_pages(results / "new")
    assert "new/index.html" in Reader(results / "index.html").links
    assert "new/MODEL_CARD.md" in Reader(results / "index.html").links


def test_the_command_to_compare_two_is_quoted_for_a_shell(tmp_path: Path) -> None:
    make_run(tmp_path / "two words")
    write_index(tmp_path)
    expected = f'data-path="&#39;{tmp_path}/two words&#39;"'
    assert expected in (tmp_path / "index.html").read_text()


def test_no_run_is_a_page_too(tmp_path: Path) -> None:
    write_index(tmp_path)
    assert "No run yet." in Reader(tmp_path / "index.html").text


# ------------------------------------------------------------------------------------------------------------
# Two runs compared
# ------------------------------------------------------------------------------------------------------------


def test_a_comparison_is_a_page_with_the_cases_that_changed_most_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["final_evaluation_v2.py"])
    names = [("small", "p0"), (ODD, "p1"), ("large", "p2"), *CASES[3:]]
    write_run(tmp_path / "b", [0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3, 0.2], names)
    write_run(tmp_path / "a", [0.51, 0.4, 0.2, 0.8, 0.9, 0.4, 0.3, 0.2], names)
    compare_runs([str(tmp_path / "a"), str(tmp_path / "b")], None, 0)
    folder = tmp_path / "comparison_a_b"
    page = Reader(folder / "comparison.html")
    # (0.01 - 0.2 - 0.5) / 8; p1 and p2 are patients of two cases each, as are two others
    assert "-0.0862 95 % CI" in page.text
    assert "8 cases of 6 patients" in page.text
    assert "img" not in page.tags
    table = page.text[page.text.index("Cases that changed most") :]
    assert "large -0.500 0.200 0.700 5.0 5.0 10.0 internal WT" in table
    first = [table.index(f" {name} ") for name in ("large", ODD, "small")]
    assert first == sorted(first)
    assert page.links.count("#case-0") == 1  # the dot of a case leads to its row
    text = (folder / "comparison.html").read_text()
    assert 'id="case-0"' in text
    assert text.count("<circle") == 8
    index = Reader(tmp_path / "index.html")
    assert "comparison_a_b/comparison.html" in index.links
    assert "internal WT: A - B -0.0862 Dice" in index.text
    # audited again since
    rows = pd.read_csv(tmp_path / "a" / "evaluation" / "metrics_per_case.csv")
    rows.assign(dice=0.5).to_csv(tmp_path / "a" / "evaluation" / "metrics_per_case.csv", index=False)
    (folder.with_name("comparison_x") / "comparison.json").parent.mkdir()
    (folder.with_name("comparison_x") / "comparison.json").write_text("{")
    write_index(tmp_path)
    index = Reader(tmp_path / "index.html")
    assert "of earlier audits, compare again" in index.text
    assert "comparison.json: not readable" in index.text


def test_of_few_patients_the_least_p_there_can_be_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["final_evaluation_v2.py"])
    write_run(tmp_path / "a", [0.5] * 8)
    write_run(tmp_path / "b", [0.4] * 8)
    compare_runs([str(tmp_path / "a"), str(tmp_path / "b")], None, 0)
    text = Reader(tmp_path / "comparison_a_b" / "comparison.html").text
    assert "+0.1000 range +0.1000 to +0.1000, n = 8" in text.replace("\xa0", " ")
    assert "sign-flip p 0.125; of 4 patient(s) it cannot be below 0.125" in text  # 2 of 2^4 patterns


def test_dots_lie_where_their_dice_says() -> None:
    rows = pd.DataFrame({"cohort": "internal", "region": "WT", "case": ["x", "y"], "change": [-0.5, 0.5]})
    rows = rows.assign(dice_a=[0.5, 1.0], dice_b=[1.0, 0.5])
    panel = draw_scatter(rows, "internal", "WT")
    # from 0.4 to 1 over 300 units: 0.5 is a sixth of the way
    assert [(dot["x"], dot["y"]) for dot in panel["dots"]] == [(344.0, 250.0), (94.0, 0.0)]
    assert [tick["words"] for tick in panel["ticks"]] == ["0.4", "0.6", "0.8", "1"]
    assert [tick["at"] for tick in panel["ticks"]] == [0.0, 100.0, 200.0, 300.0]


def test_a_run_of_folds_is_one_run_with_a_page_of_each_fold(tmp_path: Path) -> None:
    run = tmp_path / "folds"
    folds = [make_run(run / f"fold_{fold}", mean=None) for fold in (0, 1)]
    write_json(run / "config.json", {"folds": 3, "fold": None, "regions": ["WT"]})
    for fold in folds:
        config = json.loads((fold / "config.json").read_text())
        write_json(fold / "config.json", config | {"folds": 3, "fold": int(fold.name[-1])})
    write_run_pages(folds[1])
    assert "| left out for another test (`--hold-out-dir`) | 1 cases |" in (run / "MODEL_CARD.md").read_text()
    page = Reader(run / "index.html")
    assert "folds trained 2 of 3" in page.text
    assert re.search(r"fold_0 ?, trained: Dice per case of 1 validation cases 0\.700, epoch 2", page.text)
    assert "Each patient is tested once" in page.text
    assert "all folds" in Reader(folds[1] / "index.html").text
    index = Reader(tmp_path / "index.html")
    assert "folds/index.html" in index.links
    assert "folds unfinished" in index.text
    # the audit of all folds, and one of them trained further since
    scores = {"dice": dice(0.6, 9), "n_cases": 9, "n_patients": 9}
    hashes = [{"fold": fold, "checkpoint_sha256": file_sha256(folds[fold] / "best.pt")} for fold in (0, 1)]
    summary = {"data_kind": "phantom", "seen_in_training": {}, "folds": hashes, "checkpoint_sha256": None}
    write_json(
        run / "evaluation" / "summary.json", summary | {"cohorts": {"internal": {"WT": {"tta": scores}}}}
    )
    assert read_run(run).headlines[0].mean == "0.600"
    save_checkpoint(folds[0] / "best.pt", {"model": {"w": torch.ones(1)}, "postprocessing": None})
    later = (run / "evaluation" / "summary.json").stat().st_mtime + 5
    os.utime(folds[0] / "best.pt", (later, later))
    assert read_run(run).is_outdated


# ------------------------------------------------------------------------------------------------------------
# What training hands over
# ------------------------------------------------------------------------------------------------------------


def test_balance_is_counted_as_stored_and_as_drawn() -> None:
    table = pd.DataFrame({"case": 0, "z": range(8), "brain_voxels": [0, 9, *[10_000] * 6]})
    table["WT"] = [0, 0, 1, 1, 0, 0, 0, 0]
    shares = balance_shares(table, balance_slices(table, 0.5, 0.02))
    assert shares["slices"].to_dict() == {"tumour": 2, "brain": 4, "empty": 2}
    assert shares["stored"].to_dict() == {"tumour": 0.25, "brain": 0.5, "empty": 0.25}
    assert shares["drawn"].to_dict() == pytest.approx({"tumour": 0.5, "brain": 0.48, "empty": 0.02})


def test_the_citation_has_what_the_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "MIT"
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
