"""Phantoms and patients: what is said of cases of each, whatever the network was trained on."""

import os
from pathlib import Path

import pytest

from audit.compare import compare_runs
from audit.kinds import kind_tested, list_kind_warnings
from audit.model_card import make_card
from audit.pages import write_run_pages
from audit.report import describe_choices, list_leakage_notes
from audit.runs import read_run
from cohort.phantom import name_kind
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.files import read_json, write_json
from tests.test_compare import CASES
from tests.test_compare import write_run as write_audited
from tests.test_pages import Reader, make_run

PHANTOMS = "synthetic phantoms, not a BraTS result"


def test_a_kind_is_that_of_all_cases() -> None:
    assert name_kind([True, True]) == "phantom"
    assert name_kind([False]) == "real"
    assert name_kind([False, True, False]) == "mixed"


@pytest.mark.parametrize(
    ("trained", "internal", "external", "tested", "warnings"),
    [
        ("real", "real", "real", "real", []),
        ("phantom", "phantom", "phantom", "phantom", [f"These are {PHANTOMS}."]),
        ("real", "real", "phantom", "mixed", [f"external: {PHANTOMS}.", f"external_unseen: {PHANTOMS}."]),
        (
            "phantom", "phantom", "real", "mixed",
            [
                f"internal: {PHANTOMS}.",
                "The network was trained on synthetic phantoms; its masks of real scans mean nothing.",
            ],
        ),
        ("mixed", "mixed", "real", "mixed", ["internal: patients and synthetic phantoms."]),
    ],
)  # fmt: skip
def test_what_is_said_of_a_cohort_is_of_its_own_cases(
    trained: str, internal: str, external: str, tested: str, warnings: list[str]
) -> None:
    summary = {
        "data_kind": trained,
        "kinds": {"validation": trained, "internal": internal, "external": external},
        "cohorts": {"validation": {}, "internal": {}, "external": {}, "external_unseen": {}},
    }
    assert kind_tested(summary) == tested
    assert list_kind_warnings(summary) == warnings
    earlier = {"data_kind": "phantom", "cohorts": {"internal": {}}}  # says what was trained on alone
    assert list_kind_warnings(earlier) == [f"These are {PHANTOMS}."]


def test_the_card_names_the_kind_of_each_cohort_and_what_training_saw_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", kind="real")
    path = run / "evaluation" / "summary.json"
    summary = read_json(path, "", "")
    summary["cohorts"]["external"] = summary["cohorts"]["internal"]
    summary |= {"kinds": {"validation": "real", "internal": "real", "external": "phantom"}}
    summary["seen_in_training"] = {"external": {"cases": 7, "seen": 3, "unseen": 4}}
    summary["missing_modalities"] = {"external": {"flair": 2}}
    write_json(path, summary)
    write_run_pages(run)
    card = (run / "MODEL_CARD.md").read_text()
    assert "external cohort (synthetic phantoms; 3 of 7 seen in training or validation)" in card
    assert "name: held-out test patients (patients)" in card
    for page in (card, Reader(run / "index.html").text, Reader(tmp_path / "index.html").text):
        assert "external: synthetic phantoms." in page
        assert "external: 2 cases have no flair." in page


def test_a_comparison_is_of_the_cases_and_not_of_what_was_trained_on(tmp_path: Path) -> None:
    for name in "ab":
        write_audited(tmp_path / name, [0.5] * len(CASES))
        path = tmp_path / name / "evaluation" / "summary.json"
        write_json(path, {"data_kind": "phantom", "kinds": {"internal": "real"}})
    compare_runs([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"), 0)
    assert read_json(tmp_path / "out" / "comparison.json", "", "")["data_kind"] == "real"
    assert "names cases of patients" in Reader(tmp_path / "out" / "comparison.html").text


# ------------------------------------------------------------------------------------------------------------
# What else qualifies a number
# ------------------------------------------------------------------------------------------------------------


def choice(settings: dict) -> dict:
    return {"settings": settings}


HOLES = {"WT": {"fill_holes": True, "min_component_mm3": 0.0, "min_total_mm3": 0.0}}


def test_one_validation_case_chooses_no_threshold() -> None:
    for cases, words in (
        (1, "0.5, as one validation case chooses none: WT 0.50"),
        (2, "chosen on validation: WT 0.50"),
    ):
        summary = {
            "threshold": {"WT": 0.5},
            "postprocessing": choice(HOLES),
            "cohorts": {"validation": {"WT": {"plain": {"n_cases": cases}}}},
        }
        assert describe_choices(summary) == {
            "threshold": words,
            "postprocessing": "chosen on validation: WT: holes filled; plain and TTA are with it",
        }


def test_the_choices_of_folds_are_those_of_each_and_their_mean_is_for_external_cases() -> None:
    fold = {"n_cases": {"validation": 2}, "postprocessing": choice(HOLES)}
    summary = {
        "threshold": {"WT": 0.4},
        "postprocessing": choice({}),
        "folds": [fold],
        "cohorts": {"internal": {}},
    }
    assert (
        describe_choices(summary)["postprocessing"]
        == "chosen on validation: internal each fold's own, see Folds"
    )
    summary["cohorts"]["external"] = {}
    found = describe_choices(summary)
    assert found["threshold"].endswith("see Folds; external WT 0.40, the mean of these")
    assert found["postprocessing"].endswith("see Folds; external none, the median of these")


def test_the_report_says_what_the_search_for_leakage_could_not_see() -> None:
    assert list_leakage_notes({"declared_different": []}) == []
    first, second = list_leakage_notes(
        {"compared_without_content": {"external": 2}, "declared_different": [["a", "b"]]}
    )
    assert first.startswith("2 external case(s) lack the modality")
    assert second.startswith("1 pair(s) that look alike count as two people")


def test_the_card_is_of_the_weights_and_lists_every_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    config = read_json(run / "config.json", "", "")
    own = {"learning_rate": 0.5, "regions": ["WT"], "keep": "best"}
    best = load_checkpoint(run / "best.pt")
    save_checkpoint(run / "best.pt", best | {"config": own})
    resumed = {"learning_rate": 0.25, "resumed_with": ["python train_drunet_v2.py --resume r"]}
    write_json(run / "config.json", config | resumed)
    card = make_card(read_run(run))
    assert "| `learning_rate` | `0.5` |" in card
    assert "```\npython train_drunet_v2.py --run `x`\npython train_drunet_v2.py --resume r\n```" in card


def test_what_the_first_weights_had_learnt_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    begun = {"path": "x", "weights_sha256": "0", "data_kind": "phantom", "validation_seen": 2}
    save_checkpoint(run / "best.pt", load_checkpoint(run / "best.pt") | {"init": begun})
    words = (
        "Training began with weights that had learnt synthetic phantoms; they had seen 2 of the validation"
    )
    assert words in make_card(read_run(run))
    begun |= {"data_kind": "real", "validation_seen": 0}
    save_checkpoint(run / "best.pt", load_checkpoint(run / "best.pt") | {"init": begun})
    assert "Training began with weights that had learnt patients." in make_card(read_run(run))


def test_an_audit_amid_training_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    assert read_run(run).state == "audited"
    best = load_checkpoint(run / "best.pt")
    del best["postprocessing"]
    path = run / "evaluation" / "summary.json"
    save_checkpoint(run / "best.pt", best)
    summary = read_json(path, "", "")
    write_json(path, summary | {"checkpoint_sha256": None})
    facts = read_run(run)
    assert facts.state == "audited, training not finished"
    assert "Post-processing has not been chosen, as training is not finished." in make_card(facts)


def test_weights_that_are_written_again_are_those_audited(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    path = run / "evaluation" / "summary.json"
    best = load_checkpoint(run / "best.pt") | {"config": {"regions": ["WT"]}}
    known = {"weights_sha256": best["weights_sha256"], "threshold": {"WT": 0.4}, "postprocessing": None}
    write_json(path, read_json(path, "", "") | known)
    later = path.stat().st_mtime + 5
    for changes, state in (
        ({"epoch": 2}, "audited"),
        ({"thresholds": [0.3]}, "trained further since its audit"),
    ):
        save_checkpoint(run / "best.pt", best | changes)
        os.utime(run / "best.pt", (later, later))
        assert read_run(run).state == state
