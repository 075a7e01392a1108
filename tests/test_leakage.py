"""Leakage: fingerprints against disguises, the order of evidence, the split, --hold-out-dir, the audit."""

import dataclasses
import functools
import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from test_commands import TINY, complaint, run

from audit.seen import attach_volumes, identify_seen, list_leakage, search_leakage
from cohort.cache import prepare_cases
from cohort.cases import Case
from cohort.fingerprints import (
    GRID,
    hash_image,
    hash_mask,
    make_thumbnail,
    rank_voxels,
    split_in_two,
)
from cohort.layouts import CaseSource, find_cases
from cohort.leakage import (
    ALIKE,
    EVIDENCE,
    Identity,
    check_parts,
    compare_thumbnails,
    find_held_out,
    find_leakage,
    find_seen,
    identify_case,
    list_pairs,
    pack_identities,
    read_different,
    select_proven,
    unpack_identities,
)
from cohort.phantom import make_phantom
from runtime.checkpoints import load_checkpoint, save_checkpoint

SHAPE, SPACING_MM = (40, 60, 60), (4.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def heads():
    """FLAIR volumes (40, 60, 60) int16 of 8 phantoms, four in each style."""
    # a seed gives the same head in both styles
    seeds = {"internal": range(4), "external": range(4, 8)}
    made = [make_phantom(seed, SHAPE, SPACING_MM, style) for style in seeds for seed in seeds[style]]
    return [phantom.modalities["flair"] for phantom in made]


def similarity(one, other):
    pair = [make_thumbnail(volume.astype(np.float32))[None] for volume in (one, other)]
    return float(compare_thumbnails(*pair)[0, 0])


def equalise(volume):
    values = np.sort(volume.ravel())
    return np.searchsorted(values, volume.ravel()).reshape(volume.shape) / values.size


def crop_to_head(volume):
    ends = [np.flatnonzero(volume.any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
    return volume[tuple(slice(end[0], end[-1] + 1) for end in ends)]


DISGUISES = {
    "rescaled": lambda v: 0.37 * v + 12,
    "8 bit": lambda v: np.round(v / v.max() * 255),
    "gamma": lambda v: (v / v.max()) ** 0.5,
    "equalised": equalise,
    "z-scored, background below 0": lambda v: (v - v[v > 0].mean()) / v[v > 0].std(),
    "shifted along D": lambda v: np.roll(v, 1, 0),
    "shifted along W": lambda v: np.roll(v, -1, 2),
    "mirrored along D": lambda v: v[::-1],
    "mirrored along H": lambda v: v[:, ::-1],
    "mirrored along W": lambda v: v[:, :, ::-1],
    "H and W swapped": lambda v: v.swapaxes(1, 2)[:, ::-1],
    "cropped to the head": crop_to_head,
    "padded": lambda v: np.pad(v, 9),
    "noise in the head": lambda v: v + np.random.default_rng(0).normal(0, 0.05 * v.max(), v.shape) * (v > 0),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguised_scan_is_the_same_scan(heads, name):
    for head in heads[::3]:
        assert similarity(DISGUISES[name](head.astype(np.float64)), head) >= ALIKE


def test_different_heads_are_not_the_same_scan(heads):
    cells = np.array([make_thumbnail(head.astype(np.float32)) for head in heads])
    compared = compare_thumbnails(cells, cells)
    assert np.allclose(np.diag(compared), 1)
    assert (compared[~np.eye(len(heads), dtype=bool)] < ALIKE).all()


def test_coarse_phantoms_of_the_command_tests_are_told_apart(phantom_cohort, external_cohort, tmp_path):
    cases = [*find_cases(CaseSource(phantom_cohort)), *find_cases(CaseSource(external_cohort))]
    known = list(map(identify_case, prepare_cases(cases, ("flair",), (), tmp_path)))
    for index, one in enumerate(known):
        assert find_leakage("any", [one], known[:index] + known[index + 1 :]).empty


def test_a_constant_volume_is_like_nothing(heads):
    blank = make_thumbnail(np.zeros(SHAPE, np.float32))
    assert not blank.any()
    assert similarity(np.zeros(SHAPE), heads[0]) <= 0
    assert similarity(np.zeros(SHAPE), np.ones(SHAPE)) <= 0


def test_similarity_is_the_highest_cosine_over_mirrors_and_the_swap():
    cells = np.random.default_rng(3).integers(-127, 128, (2, GRID, GRID, GRID)).astype(np.int8)
    turned = cells[:, ::-1].swapaxes(2, 3)
    assert np.allclose(np.diag(compare_thumbnails(turned, cells)), 1)
    for step in (-1, 1):
        moved = np.roll(cells, step, 1)
        assert (np.diag(compare_thumbnails(moved, cells)) > 0.9).all()
    assert (np.diag(compare_thumbnails(np.roll(cells, 2, 1), cells)) < 0.2).all()
    quarter = cells.swapaxes(1, 2)  # D swapped with H: no picture format does that
    assert (np.diag(compare_thumbnails(quarter, cells)) < 0.2).all()
    assert compare_thumbnails(cells[:0], cells).shape == (0, 2)


def test_ranks_are_shares_with_ties_in_their_middle():
    ranks = rank_voxels(np.array([[5, 5, -1, 9]]))
    assert ranks.tolist() == [[0.5, 0.5, 0.125, 0.875]]  # places 2 and 3 of 4: 1/4 + (2/4) / 2


def test_two_groups_are_parted_between_them():
    assert 0.2 <= split_in_two(np.array([0.1] * 50 + [0.2] * 10 + [0.8] * 40)) < 0.8


def test_image_hash_ignores_type_and_sign_of_zero_but_no_value():
    image = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert hash_image(image) == hash_image(image.astype(np.float64)) == hash_image(image.astype(np.uint8))
    assert hash_image(image * -0.0) == hash_image(image * 0)
    assert hash_image(image) != hash_image(image.reshape(3, 2, 4))
    assert hash_image(image) != hash_image(image + 1)


def test_mask_hash_ignores_labels_and_padding_and_small_masks():
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:7, 2:7, 2:7] = 2
    labels[3, 3, 3] = 4
    assert hash_mask(labels) == hash_mask(np.pad(labels > 0, 3).astype(np.uint8))
    labels[2, 2, 2] = 0
    assert hash_mask(labels) != hash_mask(labels > 5)
    assert hash_mask(labels[:, :4, :4]) == ""  # 5 * 2 * 2 voxels
    assert hash_mask(None) == ""


COLUMNS = ("cohort", "case", "evidence", "training_case", "similarity", "correlation", "grade")


def made(case_id, patient_id=None, aliases=(), image="", mask="", seed=0, volume=None):
    """Return an identity of random cells and a random volume, those of one seed alike; None has no volume."""
    random = np.random.default_rng(seed)
    cells = random.integers(-127, 128, (GRID,) * 3).astype(np.int8)
    voxels = np.pad(ndimage.gaussian_filter(random.normal(0, 1, (20, 20, 20)), 0.7) + 4, 4)
    names = (case_id, patient_id or case_id, aliases)
    return Identity(*names, image or case_id, mask, cells, (lambda: voxels) if volume is None else volume)


def test_evidence_is_the_first_that_agrees():
    known = [made("k", "p", ("other name",), "i", "m", seed=1), made("far", seed=2)]
    same = made("k", "p", ("other name",), "i", "m", seed=1)
    steps = [
        ("case id", {}),
        ("patient id", {"case_id": "a"}),
        ("mapping", {"case_id": "a", "patient_id": "b"}),
        ("exact image", {"case_id": "a", "patient_id": "b", "aliases": ()}),
        ("near image", {"case_id": "a", "patient_id": "b", "aliases": (), "image_sha256": "j"}),
    ]
    blank = np.zeros((GRID,) * 3, np.int8)
    steps.append(("mask", {**steps[-1][1], "thumbnail": blank}))
    for evidence, changes in steps:
        one = dataclasses.replace(same, **changes)
        rows = find_leakage("external", [one], known, one_cohort=True)
        assert rows[["cohort", "evidence", "training_case"]].values.tolist() == [["external", evidence, "k"]]
        assert (rows["similarity"][0] == 1) == (evidence in ("exact image", "near image"))
        assert (rows["correlation"][0] > 0.99) == (evidence == "near image")
        assert rows["grade"][0] == EVIDENCE[evidence]
    nothing = dataclasses.replace(same, **steps[-1][1], mask_sha256="")
    rows = find_leakage("external", [nothing], known)
    assert rows.columns.tolist() == [*COLUMNS]
    assert rows.empty
    assert find_leakage("external", [same], []).empty


@pytest.mark.parametrize(
    "tested",
    [
        made("a", "b", ("BraTS19_K_1",), seed=3),
        made("a", "b", ("BraTS19_K",), seed=3),
        made("BraTS2021_00009", "b", seed=3),
        made("a", "BraTS2021_00009", seed=3),
        made("a", "b", ("BraTS2021_00009",), seed=3),
    ],
)
def test_a_mapping_names_a_case_from_either_side(tested):
    rows = find_leakage("external", [tested], [made("BraTS19_K_1", "BraTS19_K", ("BraTS2021_00009",))])
    assert rows["evidence"].tolist() == ["mapping"]


def test_a_duplicate_over_the_parts_of_a_split_is_an_error_that_names_both(input_error):
    parts = {"train": [made("a", seed=1), made("b", seed=2)], "validation": [made("c", seed=3)], "test": []}
    check_parts(parts)
    twin = made("twin", seed=2)
    with input_error("twin", "b (train)", "near image", "--mapping"):
        check_parts(parts | {"test": [twin]})
    check_parts(parts | {"train": [*parts["train"], twin]})  # within one part it does no harm


def test_alike_but_not_verified_is_warned_of_and_stops_nothing(caplog, tmp_path):
    one, twin = made("a", seed=1), dataclasses.replace(made("b", seed=1), read_volume=None)
    rows = find_leakage("external", [twin], [one])
    assert rows[["evidence", "training_case", "grade"]].values.tolist() == [
        ["alike image", "a", "alike, not verified"]
    ]
    assert np.isnan(rows["correlation"][0])
    other_voxels = made("c", seed=5).read_volume
    differing = dataclasses.replace(twin, read_volume=other_voxels)  # as two people of one atlas
    rows = find_leakage("external", [differing], [one])
    assert rows["evidence"].tolist() == ["alike image"]
    assert rows["correlation"][0] < 0.3
    for second in (twin, differing):
        caplog.clear()
        check_parts({"train": [one], "validation": [second]})
        assert find_held_out([second], [one]).empty
        for cohort in ("internal", "external"):
            _, seen = search_leakage(tmp_path / "l.csv", {cohort: [second]}, [one], allow_seen=False)
            assert seen[cohort] == {"cases": 1, "seen": 0, "unseen": 1}
        warned = " ".join(record.message for record in caplog.records if record.levelname == "WARNING")
        assert all(word in warned for word in ("b and a", "--different", "no proof"))


def test_pairs_declared_different_stop_nothing_and_other_pairs_still_do(tmp_path, input_error, caplog):
    path = tmp_path / "pairs.csv"
    path.write_text("case_1,case_2\nb, a\n\nx,y\n")
    different = read_different(path)
    assert list_pairs(different) == [["a", "b"], ["x", "y"]]
    one, twin, third = made("a", seed=1), made("b", seed=1), made("c", seed=1)
    with input_error("b (validation)", "near image", "--different"):
        check_parts({"train": [one], "validation": [twin]})
    check_parts({"train": [one], "validation": [twin]}, different)
    assert not caplog.records
    with input_error("c (validation)", "a (train)"):
        check_parts({"train": [one], "validation": [third]}, different)
    assert find_held_out([twin], [one], different).empty
    copy = dataclasses.replace(twin, image_sha256="a")  # one file is one scan, whatever anybody says
    rows = find_leakage("external", [copy], [one], different=different)
    assert rows["evidence"].tolist() == ["exact image"]
    path.write_text("a\n")
    with input_error("--different", "row 1"):
        read_different(path)
    with input_error("--different", "nowhere.csv"):
        read_different(tmp_path / "nowhere.csv")
    assert read_different(None) == frozenset()


def test_an_id_that_every_site_has_is_no_evidence_by_itself(caplog, tmp_path):
    ours, theirs = made("patient_001", seed=1), made("patient_001", image="theirs", seed=2)
    rows = find_leakage("external", [theirs], [ours])
    assert rows[["evidence", "grade"]].values.tolist() == [["same id", "same id, content not alike"]]
    assert find_held_out([ours], [theirs]).empty
    assert "patient_001" in caplog.text
    _, seen = search_leakage(tmp_path / "l.csv", {"external": [theirs]}, [ours], allow_seen=False)
    assert seen["external"] == {"cases": 1, "seen": 0, "unseen": 1}
    again = dataclasses.replace(theirs, thumbnail=ours.thumbnail, read_volume=ours.read_volume)
    assert find_leakage("external", [again], [ours])["evidence"].tolist() == ["near image"]  # content decides
    assert find_leakage("internal", [theirs], [ours], one_cohort=True)["evidence"].tolist() == ["case id"]
    for name in ("BraTS2021_00001", "UPENN-GBM-00001_11"):
        rows = find_leakage("external", [made(name, seed=2)], [made(name, seed=1)])
        assert rows["evidence"].tolist() == ["case id"]
    visits = [made(f"sub-001_ses-{n}", "sub-001", image=str(n), seed=n) for n in (1, 2)]
    assert find_leakage("external", visits[:1], visits[1:])["evidence"].tolist() == ["same id"]
    listed = [made(name, aliases=("18",), seed=n) for n, name in enumerate(("17", "19"), 1)]
    rows = find_leakage("external", [made("18", seed=4)], listed)
    assert select_proven(rows).empty  # patient 18 of a sheet of another site


def test_held_out_are_all_cases_of_a_patient_found_by_one():
    own = [made("scan1", "p", seed=1), made("scan2", "p", seed=2), made("other", "q", seed=3)]
    table = find_held_out(own, [made("renamed", seed=1)])
    assert table["case"].tolist() == ["scan1", "scan2"]
    assert table["patient"].tolist() == ["p", "p"]
    assert table["evidence"].tolist() == ["near image", "patient id"]
    assert table["known_as"].tolist() == ["renamed", "scan1"]
    assert find_held_out(own, [made("far", seed=9)]).empty


def test_all_scans_of_a_patient_known_by_one_image_are_seen():
    known = [made("old_1", image="i")]
    tested = [made("new_1", "p", image="i", seed=1), made("new_2", "p", seed=2), made("other", seed=3)]
    found = find_seen("external", tested, known)
    assert found[["cohort", "case", "evidence", "training_case"]].to_numpy().tolist() == [
        ["external", "new_1", "exact image", "old_1"],
        ["external", "new_2", "patient id", "old_1"],
    ]


def test_identities_survive_a_checkpoint(tmp_path):
    known = [made("a", "p", ("x", "y"), "i", "m"), made("b")]
    content = pack_identities(known) | {"model": {"w": torch.zeros(1)}}
    save_checkpoint(tmp_path / "c.pt", content)
    back = unpack_identities(load_checkpoint(tmp_path / "c.pt"))
    for one, other in zip(known, back, strict=True):
        assert (one.thumbnail == other.thumbnail).all()
        blank = {"thumbnail": None}
        assert dataclasses.replace(one, **blank) == dataclasses.replace(other, **blank)
    assert unpack_identities({"seen": [["a", "p", "i"]]}) is None  # as runs had it before fingerprints


@pytest.fixture
def prepare(tmp_path, write_nifti):
    """Function (id, FLAIR, patient, aliases) that writes a case without a mask and returns it prepared."""

    def prepare_one(case_id, flair, patient_id=None, aliases=()):
        path = write_nifti(tmp_path / f"{case_id}_flair.nii.gz", flair.T)
        case = Case(
            case_id, patient_id or case_id, "c", "brats2021", "brats", {"flair": (path,)}, (), 1, {}, aliases
        )
        return prepare_cases([case], ("flair",), (), tmp_path / "cache")[0]

    return prepare_one


def test_the_identity_of_a_prepared_case_is_of_its_file_as_it_is(prepare, heads):
    identity = identify_case(prepare("a", heads[0], "p", ("n",)))
    assert (identity.case_id, identity.patient_id, identity.aliases) == ("a", "p", ("n",))
    assert identity.image_sha256 == hash_image(heads[0])
    assert identity.mask_sha256 == ""
    assert (identity.thumbnail == make_thumbnail(heads[0].astype(np.float32))).all()
    assert identify_case(prepare("a", heads[1])).image_sha256 == hash_image(heads[1])


def test_leakage_is_searched_in_the_cohorts_to_be_tested(prepare, heads):
    train, validation, other = (prepare(name, heads[n]) for n, name in enumerate("tvo"))
    again, sibling = prepare("x", heads[0] * 2, "p"), prepare("y", heads[3], "p")
    known = identify_seen(pack_identities([identify_case(train), identify_case(validation)]), [])
    cohorts = {"internal": [identify_case(other)], "external": [identify_case(again), identify_case(sibling)]}
    assert list_leakage(cohorts, known)["evidence"].tolist() == ["alike image"]  # the volume is not at hand
    asked = []
    fetch = functools.partial(fetch_and_note, [train, validation], asked)
    known = attach_volumes(known, [one for cases in cohorts.values() for one in cases], fetch, 0)
    assert asked == [{"t"}]
    found = list_leakage(cohorts, known)
    assert found[["cohort", "case", "evidence", "training_case"]].to_numpy().tolist() == [
        ["external", "x", "near image", "t"],
        ["external", "y", "patient id", "t"],
    ]
    assert list_leakage({"internal": [identify_case(other)]}, known).empty


def fetch_and_note(cases, asked, wanted):
    asked.append(wanted)
    return [case for case in cases if case.case_id in wanted]


def test_a_volume_that_has_changed_since_training_verifies_nothing(prepare, heads):
    train, again = prepare("t", heads[0]), identify_case(prepare("x", heads[0] * 2))
    known = identify_seen(pack_identities([identify_case(train)]), [])
    fetch = functools.partial(fetch_and_note, [prepare("t", heads[1])], [])
    assert attach_volumes(known, [again], fetch, 0)[0].read_volume is None


def test_an_old_checkpoint_knows_its_cases_by_what_is_still_there(prepare, heads, caplog):
    checkpoint = {"seen": [["t", "t", "i"], ["gone", "p", "i"]]}
    known = identify_seen(checkpoint, [prepare("t", heads[0])])
    assert [(one.case_id, one.patient_id) for one in known] == [("t", "t"), ("gone", "p")]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "first gone" in warning
    tested = [prepare("x", heads[0] + 7), prepare("y", heads[1], "p"), prepare("z", heads[2])]
    found = list_leakage({"internal": list(map(identify_case, tested))}, known)
    assert found[["case", "evidence", "training_case"]].to_numpy().tolist() == [
        ["x", "near image", "t"],
        ["y", "patient id", "gone"],
    ]


# ------------------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------------------


def disguise(source, target):
    """Copy a case under another id: float, rescaled, mirrored, with a voxel less of its mask."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        image = nib.load(path)
        array = np.asarray(image.dataobj)[::-1]
        if path.name.endswith("_seg.nii.gz"):
            array = array.copy()
            array[tuple(np.argwhere(array)[0])] = 0
        else:
            array = array.astype(np.float32) * 0.01 + 3
        name = path.name.replace(source.name, target.name).removesuffix(".gz")
        nib.save(nib.Nifti1Image(array, image.affine), target / name)
    return target


@pytest.fixture(scope="module")
def held(tmp_path_factory, phantom_cohort, external_cohort):
    """A folder with the run `honest`, trained with a cohort held out that has two of its patients."""
    folder = tmp_path_factory.mktemp("held")
    shutil.copytree(external_cohort, folder / "cohort")
    names = sorted(path.name for path in phantom_cohort.iterdir() if path.is_dir())
    disguise(phantom_cohort / names[2], folder / "cohort" / "BraTS2021_09999")
    shutil.copytree(phantom_cohort / names[5], folder / "cohort" / names[5])
    arguments = ("--data-dir", phantom_cohort, "--run", "honest", "--epochs", 1, *TINY)
    done = run("train_drunet_v2.py", *arguments, "--hold-out-dir", "cohort", cwd=folder)
    return folder, names, done


def test_hold_out_leaves_a_cohort_out_of_the_run_and_records_it(held):
    folder, names, done = held
    left_out = [names[2], names[5]]
    table = pd.read_csv(folder / "results" / "honest" / "held_out.csv")
    assert table["case"].tolist() == left_out
    assert table["evidence"].tolist() == ["near image", "case id"]
    assert table["known_as"].tolist() == ["BraTS2021_09999", names[5]]
    assert all(name in done.stdout for name in (*left_out, "2 cases of 2 patients"))
    split = json.loads((folder / "results" / "honest" / "split.json").read_text())
    used = split["train"] + split["validation"] + split["test"]
    assert sorted(used) == sorted(set(names) - set(left_out))
    checkpoint = load_checkpoint(folder / "results" / "honest" / "best.pt")
    assert checkpoint["held_out"] == left_out
    assert set(checkpoint["spacing_mm"]) == {"in_plane", "slices"}
    assert json.loads((folder / "results" / "honest" / "config.json").read_text())["held_out"] == left_out
    assert not {entry[0] for entry in checkpoint["seen"]} & set(left_out)


def test_a_resumed_run_still_leaves_the_cohort_out(held):
    folder, names, _ = held
    shutil.copytree(folder / "results" / "honest", folder / "results" / "resumed")
    run("train_drunet_v2.py", "--resume", "results/resumed", "--epochs", 2, cwd=folder)
    checkpoint = load_checkpoint(folder / "results" / "resumed" / "last.pt")
    assert checkpoint["held_out"] == [names[2], names[5]]


def audit(folder, external, *arguments, expect=0):
    command = ("--run", "results/honest", "--external-dir", external, "--device", "cpu", "--output", "audit")
    return run("final_evaluation_v2.py", *command, *arguments, cwd=folder, expect=expect)


def test_the_cohort_held_out_is_external(held):
    folder, _, _ = held
    done = audit(folder, "cohort")
    assert "external: 5 cases, 0 of them seen in training or validation, 5 unseen" in done.stdout
    summary = json.loads((folder / "audit" / "summary.json").read_text())
    assert not summary["includes_seen_cases"]
    assert "external_unseen" not in summary["cohorts"]


def test_an_external_cohort_with_seen_cases_is_reported_in_both_forms(held, phantom_cohort, external_cohort):
    folder, _, _ = held
    seen = json.loads((folder / "results" / "honest" / "split.json").read_text())["train"][0]
    shutil.copytree(external_cohort, folder / "mixed")
    disguise(phantom_cohort / seen, folder / "mixed" / "BraTS2021_09998")
    done = audit(folder, "mixed")
    assert "external: 4 cases, 1 of them seen in training or validation, 3 unseen" in done.stdout
    assert "not a held-out result" in done.stdout
    leakage = pd.read_csv(folder / "audit" / "leakage.csv")
    assert leakage.columns.tolist() == [*COLUMNS]
    assert leakage["grade"][0] == "same scan, verified"
    assert leakage.iloc[0, :4].tolist() == ["external", "BraTS2021_09998", "near image", seen]
    assert leakage["similarity"][0] > 0.99
    summary = json.loads((folder / "audit" / "summary.json").read_text())
    assert summary["cohorts"]["external"]["WT"]["tta"]["n_cases"] == 4
    assert summary["cohorts"]["external_unseen"]["WT"]["tta"]["n_cases"] == 3
    assert "1 of 4 cases were in training" in (folder / "audit" / "report.html").read_text()


def test_a_cohort_of_which_nothing_is_unseen_is_not_called_external(held, phantom_cohort):
    folder, _, _ = held
    seen = json.loads((folder / "results" / "honest" / "split.json").read_text())["train"][0]
    disguise(phantom_cohort / seen, folder / "same" / "BraTS2021_09997")
    refused = complaint(audit(folder, "same", expect=2))
    assert all(word in refused for word in ("--external-dir", "BraTS2021_09997", seen, "--hold-out-dir"))
    allowed = audit(folder, "same", "--allow-seen")
    assert "no unseen case is left, so this cohort is not a test set" in allowed.stdout


def test_an_internal_test_case_that_was_seen_is_refused_unless_allowed(held, phantom_cohort):
    folder, _, _ = held
    split = json.loads((folder / "results" / "honest" / "split.json").read_text())
    tested, seen = split["test"][0], split["train"][0]
    shutil.copytree(phantom_cohort, folder / "spoilt")
    shutil.rmtree(folder / "spoilt" / tested)
    disguise(phantom_cohort / seen, folder / "spoilt" / tested)
    refused = complaint(audit(folder, "cohort", "--data-dir", "spoilt", expect=2))
    assert all(word in refused for word in (tested, seen, "near image", "--allow-seen"))
    assert "not a held-out result" in audit(folder, "cohort", "--data-dir", "spoilt", "--allow-seen").stdout


def test_training_stops_at_a_duplicate_over_the_parts(tmp_path, phantom_cohort):
    names = sorted(path.name for path in phantom_cohort.iterdir() if path.is_dir())
    shutil.copytree(phantom_cohort, tmp_path / "data")
    for number, name in enumerate(names):  # each patient twice: no split keeps all the twins together
        disguise(phantom_cohort / name, tmp_path / "data" / f"BraTS2021_9970{number}")
    done = run("train_drunet_v2.py", "--data-dir", "data", *TINY, "--epochs", 1, cwd=tmp_path, expect=2)
    assert "near image" in complaint(done)
    assert "--mapping" in complaint(done)


def test_two_sites_that_number_alike_are_two_cohorts(tmp_path, phantom_cohort, external_cohort):
    cohorts = {}
    for site, source in (("a", phantom_cohort), ("b", external_cohort)):
        names = sorted(path.name for path in source.iterdir() if path.is_dir())
        for number, name in enumerate(names):
            folder = tmp_path / site / f"patient_{number:03}"
            folder.mkdir(parents=True)
            for kind in ("flair", "seg"):
                shutil.copy(source / name / f"{name}_{kind}.nii.gz", folder / f"{folder.name}_{kind}.nii.gz")
        cohorts[site] = len(names)
    arguments = ("--data-dir", "a", "--run", "r", "--epochs", 1, *TINY)
    done = run("train_drunet_v2.py", *arguments, "--hold-out-dir", "b", cwd=tmp_path)
    assert "0 cases of 0 patients" in done.stdout
    tested = ("--run", "results/r", "--external-dir", "b", "--device", "cpu")
    run("final_evaluation_v2.py", *tested, cwd=tmp_path)
    summary = json.loads((tmp_path / "results" / "r" / "evaluation" / "summary.json").read_text())
    assert summary["seen_in_training"]["external"] == {
        "cases": cohorts["b"],
        "seen": 0,
        "unseen": cohorts["b"],
    }
    assert summary["leakage_grades"].get("same id, content not alike")
    assert summary["declared_different"] == []
    report = (tmp_path / "results" / "r" / "evaluation" / "report.html").read_text()
    assert "same id, content not alike" in report
    shutil.copytree(tmp_path / "a", tmp_path / "most")
    for folder in sorted((tmp_path / "most").iterdir())[:2]:
        shutil.rmtree(folder)
    again = ("--data-dir", "a", "--run", "few", *TINY, "--hold-out-dir", "most")
    done = run("train_drunet_v2.py", *again, cwd=tmp_path, expect=2)
    assert all(word in complaint(done) for word in ("--hold-out-dir most", "2 remain", "held_out.csv"))
