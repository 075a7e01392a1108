"""Several cohorts in one run: names, ids, one patient in two of them, split, weights, Dice per cohort."""

import dataclasses
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from audit.report import tabulate_sources
from audit.sources import add_origin, summarise_by_source
from cohort import several
from cohort.layouts import CaseSource, find_cases, find_cases_of_run, scan_cases
from cohort.phantom import write_cohort
from cohort.selection import TrainingSource, join_patients, select_cases
from cohort.split import split_cases
from dataset_balance_v2 import balance_cohorts, balance_slices
from runtime.checkpoints import load_checkpoint
from runtime.command import from_plain, parse, to_plain
from training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SHAPE, SPACING_MM = (16, 48, 48), (10.0, 5.0, 5.0)  # as conftest.phantom_cohort


@pytest.fixture(scope="session")
def cohorts(tmp_path_factory, phantom_cohort):
    """Two cohorts: four phantoms in BraTS 2021 layout, and in BIDS three others and one of the first four."""
    folder = tmp_path_factory.mktemp("several")
    first, second = folder / "first", folder / "second"
    names = sorted(path.name for path in phantom_cohort.iterdir() if path.is_dir())
    for name in names[:4]:
        shutil.copytree(phantom_cohort / name, first / name)
    write_cohort(folder / "other", 3, 7, SHAPE, SPACING_MM, "internal")
    others = sorted((folder / "other").iterdir())
    for number, source in enumerate([*others, phantom_cohort / names[2]], 1):
        place = second / f"sub-{number:03d}" / "anat"
        place.mkdir(parents=True)
        for ours, theirs in (("flair", "FLAIR"), ("t1", "T1w"), ("t2", "T2w"), ("seg", "seg")):
            shutil.copy(source / f"{source.name}_{ours}.nii.gz", place / f"sub-{number:03d}_{theirs}.nii.gz")
    return first, second, names[2]


@pytest.fixture
def source(cohorts, tmp_path):
    return TrainingSource((str(cohorts[0]), str(cohorts[1])), cache_dir=str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------------------
# The setting
# ------------------------------------------------------------------------------------------------------------


def test_one_folder_stays_text_and_several_are_a_tuple():
    def read(text):
        return parse(TrainConfig, "", None, shlex.split(text)).source

    assert read("--data-dir a").data_dir == "a"
    assert read("--data-dir a b").data_dir == ("a", "b")
    assert read("--data-dir a b --layout bids auto").layout == ("bids", "auto")
    assert read("--data-dir a b --cohort-weights 1 2").weight_of_cohort == {"a": 1, "b": 2}
    assert read("--data-dir a b").place == "a b"


@pytest.mark.parametrize("data_dir", ["a", ("a", "b")])
def test_settings_come_back_from_a_file(data_dir):
    settings = TrainConfig(source=TrainingSource(data_dir, cohort_weights=(1.0, 2.0)))
    assert from_plain(TrainConfig, json.loads(json.dumps(to_plain(settings)))) == settings


def test_settings_of_an_old_run_have_one_folder_and_no_dropout():
    plain = {**to_plain(TrainConfig(source=TrainingSource("data/x")))}
    for name in ("cohort_weights", "modality_dropout"):
        del plain[name]
    settings = from_plain(TrainConfig, plain)
    assert settings.source.data_dir == "data/x"
    assert settings.source.weight_of_cohort == {}
    assert settings.modality_dropout == 0


def test_weights_and_layouts_that_do_not_pair_up_with_the_folders_are_refused(cohorts, source, input_error):
    with input_error("--cohort-weights 1 2 3", "3 weights for 2 folders"):
        select_cases(dataclasses.replace(source, cohort_weights=(1, 2, 3)), 0, Path("nowhere"), False)
    with input_error("--layout bids auto msd", "3 layouts for 2 folder(s)"):
        scan_cases(dataclasses.replace(source, layout=("bids", "auto", "msd")))
    with input_error("--data-dir", "names no folder"):
        scan_cases(CaseSource(()))
    with input_error("there twice"):
        scan_cases(CaseSource((str(cohorts[0]), str(cohorts[0]))))
    with input_error("there twice"):
        scan_cases(CaseSource((str(cohorts[0]), str(cohorts[0].parent))))
    with input_error(cohorts[0].parent / "none"):
        scan_cases(CaseSource((str(cohorts[0]), str(cohorts[0].parent / "none"))))


def test_an_empty_folder_is_named_even_where_another_has_errors(tmp_path, input_error, write_nifti):
    bad = tmp_path / "bad"
    volume = np.zeros((4, 4, 4), np.int16)
    for place in ("x", "y"):
        write_nifti(bad / place / "BraTS2021_00009_flair.nii.gz", volume)
    (tmp_path / "empty").mkdir()
    with input_error(tmp_path / "empty", "no case found"):
        scan_cases(CaseSource((str(bad), str(tmp_path / "empty"))), errors=[])


def test_each_folder_has_its_own_layout(source):
    cases = scan_cases(source)
    assert {(case.cohort, case.layout) for case in cases} == {("first", "brats2021"), ("second", "bids")}
    only = scan_cases(dataclasses.replace(source, layout=("brats2021", "bids")))
    assert only == cases
    run = {"data_dir": list(source.data_dir), "modalities": ["flair"]}
    assert find_cases_of_run(run, run["data_dir"]) == cases


def test_folders_that_have_moved_keep_the_names_of_the_runs(write_nifti, tmp_path, input_error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = ["one", "two"]
    for name in before:
        for case in ("BraTS2021_00001", f"{name}_alone"):
            write_nifti(tmp_path / name / case / f"{case}_flair.nii.gz", np.zeros((4, 4, 4), np.int16))
    run = {"data_dir": before, "modalities": ["flair"]}
    cases = find_cases_of_run(run, before)
    for name in before:
        (tmp_path / name).rename(tmp_path / f"{name}_moved")
    moved = find_cases_of_run(run, ["one_moved", "two_moved"])
    assert [(case.case_id, case.cohort, case.patient_id) for case in moved] == [
        (case.case_id, case.cohort, case.patient_id) for case in cases
    ]
    assert "one_BraTS2021_00001" in {case.case_id for case in moved}
    with input_error("--data-dir one_moved", "2 folders", "one two"):
        find_cases_of_run(run, "one_moved")


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------


def test_cohorts_called_alike_are_named_by_the_folders_above_them():
    assert several.name_cohorts(["/d/site_a", "/d/site_b/"]) == ["site_a", "site_b"]
    assert several.name_cohorts(["/d/a/train", "/d/b/train"]) == ["a_train", "b_train"]


def test_ids_that_two_cohorts_share_become_two_unless_they_name_one_patient(make_cases):
    ids = [("sub-001_ses-1", "sub-001"), ("BraTS2021_00001", "BraTS2021_00001"), ("own", "own")]
    first, second = (
        [dataclasses.replace(case, cohort=name, aliases=aliases) for case in make_cases(ids[:count])]
        for name, aliases, count in (("a", ("sub-001_ses-2",), 3), ("b", ("sub-001_ses-2",), 2))
    )
    cases = {case.case_id: case for case in several.make_ids_unique([*first, *second])}
    assert sorted(cases) == [
        "a_BraTS2021_00001", "a_sub-001_ses-1", "b_BraTS2021_00001", "b_sub-001_ses-1", "own",
    ]  # fmt: skip
    assert cases["a_sub-001_ses-1"].patient_id == "a_sub-001"
    assert cases["b_sub-001_ses-1"].patient_id == "b_sub-001"
    assert cases["a_sub-001_ses-1"].aliases == ("a_sub-001_ses-2",)
    assert cases["a_BraTS2021_00001"].patient_id == cases["b_BraTS2021_00001"].patient_id == "BraTS2021_00001"
    assert cases["own"].patient_id == "own"


def test_an_id_that_is_taken_after_the_cohorts_name_is_put_in_front_is_refused(make_cases, input_error):
    cases = [
        dataclasses.replace(case, cohort=cohort)
        for cohort, ids in (("a", ["x", "b_x"]), ("b", ["x"]))
        for case in make_cases([(name, name) for name in ids])
    ]
    with input_error("b_x", "twice"):
        several.make_ids_unique(cases)


def test_a_sheet_is_about_any_of_the_cohorts(source, tmp_path, input_error):
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("id,patient\nsub-001,7\nsub-002,7\n")
    cases = {case.case_id: case for case in scan_cases(dataclasses.replace(source, mapping=str(sheet)))}
    assert cases["sub-001"].patient_id == cases["sub-002"].patient_id
    assert cases["sub-003"].patient_id != cases["sub-001"].patient_id
    sheet.write_text("id,patient\nsub-991,7\n")
    with input_error(f"--mapping {sheet}", "names none"):
        scan_cases(dataclasses.replace(source, mapping=str(sheet)))


# ------------------------------------------------------------------------------------------------------------
# One patient in two cohorts, and the split
# ------------------------------------------------------------------------------------------------------------


def test_a_scan_that_is_in_two_cohorts_is_one_patient_in_one_part(cohorts, source, tmp_path):
    shared = cohorts[2]
    cases = find_cases(source)
    assert {case.case_id: case.patient_id for case in cases}["sub-004"] == "sub-004"
    assert join_patients(source, cases, frozenset()) == {"sub-004": shared}
    for seed in range(3):
        folder = tmp_path / str(seed)
        chosen = select_cases(source, seed, folder, resumed=False)
        parts = [set(chosen.split[part]) for part in ("train", "validation", "test")]
        assert [{"sub-004", shared} <= part for part in parts].count(True) == 1
        assert all(any(name.startswith("BraTS2021") for name in part) for part in parts)
        assert all(part & {"sub-001", "sub-002", "sub-003"} for part in parts)
    assert chosen.facts["joined_patients"] == {"sub-004": shared}
    renamed = next(case for case in chosen.cases if case.case_id == "sub-004")
    assert renamed.patient_id == shared
    assert "sub-004" in renamed.aliases
    again = select_cases(source, 9, folder, resumed=True)
    assert again.split == chosen.split
    assert again.cases == chosen.cases


@pytest.mark.parametrize(
    "text", ["scan,known as\nsub-001,BraTS2021_90000\n", "id,patient\nsub-001,7\nBraTS2021_90000,7\n"]
)
def test_a_sheet_joins_patients_of_two_cohorts(source, cohorts, tmp_path, text):
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(text)
    source = dataclasses.replace(source, mapping=str(sheet))
    joined = join_patients(source, find_cases(source), frozenset())
    assert joined == {"sub-001": "BraTS2021_90000", "sub-004": cohorts[2]}


def test_brats_beside_tcga_asks_for_the_sheet_that_joins_them(make_cases, caplog):
    def cases(aliases):
        pairs = [("Brats18_TCIA13_623_1", "Brats18_TCIA13_623"), ("TCGA_HT_7473_1997", "TCGA_HT_7473")]
        brats, tcga = make_cases(pairs)
        return [
            dataclasses.replace(brats, cohort="brats", aliases=aliases),
            dataclasses.replace(tcga, cohort="lgg"),
        ]

    several.warn_of_unmapped(cases(()))
    assert "1 cases of brats, first Brats18_TCIA13_623_1" in caplog.text
    assert "lgg has too" in caplog.text
    caplog.clear()
    several.warn_of_unmapped(cases(("TCGA_HT_7473",)))
    several.warn_of_unmapped(cases(())[:1])
    assert not caplog.records


def test_two_people_who_look_alike_stay_two_where_a_person_said_so(source, cohorts, monkeypatch):
    cases = find_cases(source)
    monkeypatch.setattr("cohort.leakage.verify_pair", lambda *_: 1.0)
    monkeypatch.setattr("cohort.leakage.ALIKE", 0.0)
    alike = join_patients(source, cases, frozenset())
    assert len(alike) > 1
    pairs = [frozenset((a.case_id, b.case_id)) for a in cases for b in cases if a.cohort < b.cohort]
    # one file is never two people
    assert join_patients(source, cases, frozenset(pairs)) == {"sub-004": cohorts[2]}


def test_one_folder_is_split_and_drawn_as_before(phantom_cohort, tmp_path):
    one = TrainingSource(str(phantom_cohort), cache_dir=str(tmp_path / "cache"))
    chosen = select_cases(one, 5, tmp_path, resumed=False)
    assert chosen.split == split_cases(find_cases(one), 5)
    assert "joined_patients" not in chosen.facts
    assert not (tmp_path / "cache").exists()  # nothing is compared


def test_small_cohorts_are_split_together(make_cases):
    cases = [
        dataclasses.replace(case, cohort=cohort)
        for cohort, count in (("a", 2), ("b", 6))
        for case in make_cases([(f"{cohort}{n}", f"{cohort}{n}") for n in range(count)])
    ]
    assert several.split_cohorts(cases, 3) == split_cases(cases, 3)


# ------------------------------------------------------------------------------------------------------------
# Draws and Dice per cohort
# ------------------------------------------------------------------------------------------------------------


class Prepared:
    """As much of a prepared case as the weights need."""

    def __init__(self, cohort: str, case_id: str = "", missing: tuple[str, ...] = ()) -> None:
        self.cohort, self.case_id, self.missing = cohort, case_id, missing


def test_a_cohorts_weight_is_its_share_of_the_draws_and_each_is_balanced_by_itself():
    table = pd.DataFrame({"case": [0] * 4 + [1] * 10, "z": [*range(4), *range(10)]})
    table["brain_voxels"] = 500
    table["WT"] = [9, 0, 0, 0, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0]
    cases = [Prepared("a"), Prepared("b")]
    weights = balance_cohorts(table, cases, {"a": 1.0, "b": 3.0}, 0.5, 0.0)
    assert weights[:4] == pytest.approx([0.125, *[0.125 / 3] * 3])
    assert weights[4:] == pytest.approx([0.375 / 5] * 10)
    assert np.array_equal(balance_cohorts(table, cases, {}, 0.5, 0.0), balance_slices(table, 0.5, 0.0))
    alone = balance_cohorts(table[:4], cases[:1], {"a": 1.0, "b": 3.0}, 0.5, 0.0)
    assert alone == pytest.approx([0.5, *[0.5 / 3] * 3])


def test_dice_per_cohort_is_the_mean_over_its_cases():
    cases = [Prepared("b"), Prepared("a"), Prepared("b")]
    dice = np.array([[0.2, 0.4], [0.9, 0.8], [0.4, 0.0]])
    row = several.score_cohorts(cases, dice, ("WT", "ET"))
    assert row == pytest.approx(
        {"validation_WT_a": 0.9, "validation_ET_a": 0.8, "validation_WT_b": 0.3, "validation_ET_b": 0.2}
    )
    assert several.show_scores(row) == " (WT_a 0.9000, ET_a 0.8000, WT_b 0.3000, ET_b 0.2000)"
    assert several.score_cohorts(cases[:1], dice[:1], ("WT", "ET")) == {}
    assert several.show_scores({"train_loss": 1.0}) == ""


# ------------------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------------------


def run(script, *arguments, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_on_two_cohorts_is_trained_resumed_audited_and_used(cohorts, tmp_path):
    first, second, shared = cohorts
    tiny = "--size 48 --widths 4 8 --batch-size 8 --slabs-per-epoch 16 --workers 0 --device cpu"
    tiny += " --learning-rate 1e-2 --modalities flair t1 --modality-dropout 0.3 --run both"
    said = run(
        "train_drunet_v2.py", "--data-dir", first, second, "--cohort-weights", 1, 2, "--epochs", 1,
        *tiny.split(), cwd=tmp_path,
    )  # fmt: skip
    assert f"sub-004 and {shared}" in said
    run("train_drunet_v2.py", "--resume", "results/both", "--epochs", 2, "--device", "cpu", cwd=tmp_path)
    folder = tmp_path / "results" / "both"
    config = json.loads((folder / "config.json").read_text())
    assert config["data_dir"] == [str(first), str(second)]
    assert "--cohort-weights" in config["command"]
    (resumed,) = config["resumed_with"]
    assert "--resume" in resumed
    log = pd.read_csv(folder / "log.csv")
    assert len(log) == 2
    split = json.loads((folder / "split.json").read_text())
    counts = [sum(name.startswith("sub") == bids for name in split["validation"]) for bids in (0, 1)]
    means = [log["validation_WT_first"], log["validation_WT_second"]]
    overall = sum(count * mean for count, mean in zip(counts, means, strict=True)) / sum(counts)
    assert overall.to_numpy() == pytest.approx(log["validation_dice_WT"].to_numpy())
    assert load_checkpoint(folder / "best.pt")["config"]["modality_dropout"] == 0.3

    lacking = tmp_path / "lacking"  # of other heads, one of which has no FLAIR
    write_cohort(lacking, 2, 4, SHAPE, SPACING_MM, "external")
    without = sorted(lacking.iterdir())[0]
    (without / f"{without.name}_flair.nii.gz").unlink()
    for path in lacking.glob("*/*.nii.gz"):  # they pass for patients
        path.write_bytes(
            gzip.compress(gzip.decompress(path.read_bytes()).replace(b"DRUnet V2 synth", b"Scanner A scan."))
        )
    run("final_evaluation_v2.py", "--device", "cpu", "--external-dir", lacking, cwd=tmp_path)
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert set(summary["cohorts"]) == {"validation", "internal", "external"}
    assert summary["missing_modalities"] == {"external": {"flair": 1}}
    assert summary["compared_without_content"] == {"external": 1}
    assert summary["kinds"] == {"validation": "phantom", "internal": "phantom", "external": "real"}
    report = (folder / "evaluation" / "report.html").read_text()
    assert "This page shows patients" in report
    assert "Synthetic phantom. Internal: first case." in report
    assert "Synthetic phantom. External" not in report
    assert "The network was trained on synthetic phantoms" in report
    assert "1 external case(s) lack the modality" in report
    rows = pd.read_csv(folder / "evaluation" / "metrics_per_case.csv", keep_default_na=False)
    assert set(rows["source"]) == {"first", "second", "lacking"}
    assert set(rows.loc[rows["missing"] == "flair", "case"]) == {without.name}
    for source in ("first", "second"):
        part = summary["by_source"]["internal"][source]["WT"]["tta"]
        own = rows[(rows["cohort"] == "internal") & (rows["source"] == source) & (rows["mode"] == "tta")]
        assert part["n_cases"] == len(own) > 0
        assert part["dice"]["mean"] == pytest.approx(own["dice"].mean())
    assert "Per cohort trained on" in report
    parts = summary["by_source"]["internal"]
    for source, part in parts.items():
        assert f">{source}, {part['WT']['tta']['n_cases']} case" in report  # in the headline
    for line in ("internal: first", "internal: second", "external"):
        assert f"<option>{line}</option>" in report
        assert f'data-cohort="{line}"' in report
    for name in ("index.html", "MODEL_CARD.md"):
        page = (folder / name).read_text()
        assert "sub-004" not in page  # which is one patient with a case of the other cohort
        assert shared not in page
    if {"sub-004", shared} <= set(split["test"]):
        assert summary["cohorts"]["internal"]["WT"]["tta"]["n_patients"] == len(split["test"]) - 1

    said = run(
        "inference_v2.py",
        "--input",
        lacking,
        "--output",
        "masks",
        "--no-tta",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    table = pd.read_csv(tmp_path / "masks" / "volumes.csv", keep_default_na=False).set_index("case")
    assert table.loc[without.name, "warnings"].startswith("flair is missing and filled")
    assert "missing" not in table.drop(without.name)["warnings"].item()
    assert f"{without.name}: flair is missing" in said
    run("inference_v2.py", "--output", "own", "--no-tta", "--device", "cpu", cwd=tmp_path)
    assert sorted(pd.read_csv(tmp_path / "own" / "volumes.csv")["case"]) == split["test"]


def test_the_table_per_source_leaves_the_external_cohort_to_itself():
    rows = pd.DataFrame(
        [
            {"cohort": cohort, "case": case, "patient": case, "region": "WT", "mode": "plain", "dice": dice}
            for cohort, case, dice in (
                ("internal", "p", 0.5), ("internal", "q", 0.7),
                ("validation", "r", 0.1), ("external", "p", 0.9),
            )
        ]
    )  # fmt: skip
    others = ("precision", "recall", "hd95_mm", "nsd_1mm", "volume_error_ml", "lesion_dice", "lesion_hd95_mm")
    counts = ("tumour_slices", "reference_ml", "prediction_ml", "tp", "fp", "fn")
    counts += ("lesions_tp", "lesions_fp", "lesions_fn", "dice_slice")
    rows = rows.assign(**dict.fromkeys((*others, *counts), 1))
    cohorts = {
        "internal": [Prepared("a", "p"), Prepared("b", "q")],
        "validation": [Prepared("a", "r")],
        "external": [Prepared("x", "p")],
    }
    marked = add_origin(rows, cohorts)
    assert marked["source"].tolist() == ["a", "b", "a", "x"]
    summary = summarise_by_source(marked, ("WT",), 0)
    assert {(c, s) for c, sources in summary["by_source"].items() for s in sources} == {
        ("internal", "a"), ("internal", "b"), ("validation", "a"),
    }  # fmt: skip
    assert summary["by_source"]["internal"]["b"]["WT"]["plain"]["dice"]["mean"] == 0.7
    assert tabulate_sources(summary)["cohort"].tolist() == ["internal: a", "internal: b", "validation: a"]
    one = {name: [Prepared("a", case.case_id) for case in cases] for name, cases in cohorts.items()}
    assert add_origin(rows, one | {"external": [Prepared("x", "p")]}).equals(rows)
    assert summarise_by_source(rows, ("WT",), 0) == {}
