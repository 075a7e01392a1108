"""The synthetic cohorts: seeded, in real BraTS 2021 layout, labelled as phantoms, whole files or none."""

import gzip
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import make_phantom_v2
from cohort.cases import load_case
from cohort.layouts import CaseSource, find_cases
from cohort.phantom import MODALITIES, PHANTOM_DESCRIPTION, is_phantom, make_phantom, write_cohort
from make_phantom_v2 import PhantomConfig
from runtime.command import run_command
from runtime.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPE = (16, 48, 48)
SPACING_MM = (10.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def phantoms() -> dict[tuple[str, int], make_phantom_v2.Phantom]:
    """Phantoms by (style, seed)."""
    return {
        (style, seed): make_phantom(seed, SHAPE, SPACING_MM, style)
        for style in ("internal", "external")
        for seed in (1, 2, 3, 4)
    }


def test_the_same_arguments_give_the_same_voxels(phantoms):
    again = make_phantom(1, SHAPE, SPACING_MM, "internal")
    first = phantoms["internal", 1]
    assert (again.labels == first.labels).all()
    for name in MODALITIES:
        assert (again.modalities[name] == first.modalities[name]).all()


def test_seeds_differ(phantoms):
    first, second = phantoms["internal", 1], phantoms["internal", 2]
    assert (first.labels != second.labels).any()
    assert ((first.modalities["flair"] > 0) != (second.modalities["flair"] > 0)).any()  # another head
    assert (first.modalities["flair"] != second.modalities["flair"]).mean() > 0.1


def test_the_styles_show_the_same_head_and_tumour_in_another_scanner(phantoms):
    for seed in (1, 2):
        internal, external = phantoms["internal", seed], phantoms["external", seed]
        assert (internal.labels == external.labels).all()
        for name in MODALITIES:
            here, there = internal.modalities[name], external.modalities[name]
            assert ((here > 0) == (there > 0)).all()
            assert (here != there)[here > 0].mean() > 0.9


def test_types_shapes_and_values(phantoms):
    for phantom in phantoms.values():
        assert tuple(phantom.modalities) == ("flair", "t1", "t1ce", "t2")
        assert phantom.spacing_mm == SPACING_MM
        assert (phantom.labels.shape, phantom.labels.dtype) == (SHAPE, np.uint8)
        assert set(np.unique(phantom.labels)) <= {0, 1, 2, 4}
        for volume in phantom.modalities.values():
            assert (volume.shape, volume.dtype) == (SHAPE, np.int16)
            assert volume.min() == 0
    assert {4} <= {int(value) for phantom in phantoms.values() for value in np.unique(phantom.labels)}


def test_the_background_is_exactly_zero_in_every_modality_and_holds_no_tumour(phantoms):
    for phantom in phantoms.values():
        brain = phantom.modalities["flair"] > 0
        assert 0.05 < brain.mean() < 0.6
        for volume in phantom.modalities.values():
            assert ((volume > 0) == brain).all()
        assert not brain[:, (0, -1), :].any()
        assert not brain[:, :, (0, -1)].any()
        assert 0 < (phantom.labels > 0).sum() < 0.3 * brain.sum()
        assert not phantom.labels[~brain].any()


def test_tumour_is_brighter_on_flair_than_most_of_the_brain_but_not_alone(phantoms):
    for phantom in phantoms.values():
        flair, labels = phantom.modalities["flair"], phantom.labels
        healthy = flair[(flair > 0) & (labels == 0)]
        edema = flair[labels == 2]
        assert np.median(edema) > np.median(healthy)
        assert (healthy > np.percentile(edema, 25)).sum() > 10  # what looks like tumour and is not


def test_one_seed_is_one_head_at_every_resolution():
    coarse = make_phantom(5, (16, 48, 48), (10.0, 5.0, 5.0))
    fine = make_phantom(5, (32, 96, 96), (5.0, 2.5, 2.5))
    for name, pick, least in (
        ("brain", lambda phantom: phantom.modalities["flair"] > 0, 0.93),
        ("tumour", lambda phantom: phantom.labels > 0, 0.7),  # 10 mm slices cut its surface coarsely
    ):
        volume_ml = [pick(p).sum() * np.prod(p.spacing_mm) / 1000 for p in (coarse, fine)]
        assert abs(volume_ml[0] / volume_ml[1] - 1) < 0.15, name
        enlarged = pick(coarse).repeat(2, 0).repeat(2, 1).repeat(2, 2)
        overlap = 2 * (enlarged & pick(fine)).sum() / (enlarged.sum() + pick(fine).sum())
        assert overlap > least, name


def test_the_cohort_has_the_layout_and_the_header_of_brats_2021(phantom_cohort):
    folders = sorted(phantom_cohort.iterdir())
    assert [folder.name for folder in folders] == [f"BraTS2021_{90000 + number}" for number in range(8)]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            f"{folder.name}_{name}.nii.gz" for name in (*MODALITIES, "seg")
        )
    for name in (*MODALITIES, "seg"):
        image = nib.load(folders[0] / f"{folders[0].name}_{name}.nii.gz")
        assert image.shape == (48, 48, 16)  # X, Y, Z
        assert image.get_data_dtype() == (np.uint8 if name == "seg" else np.int16)
        expected = [[-5, 0, 0, 0], [0, -5, 0, 47 * 5], [0, 0, 10, 0], [0, 0, 0, 1]]
        np.testing.assert_allclose(image.affine, expected)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
        np.testing.assert_allclose(image.get_qform(), expected, atol=1e-4)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.header["descrip"].item().decode() == PHANTOM_DESCRIPTION


def test_the_cohort_reads_back_as_it_was_made(phantom_cohort):
    case = find_cases(CaseSource(phantom_cohort), MODALITIES)[3]
    phantom = make_phantom(90003, SHAPE, SPACING_MM)
    loaded = load_case(case, MODALITIES)
    assert is_phantom(case)
    assert loaded.spacing_mm == SPACING_MM
    assert (loaded.labels == phantom.labels).all()
    assert (loaded.volume == np.stack(list(phantom.modalities.values()))).all()


def test_the_styles_have_ids_and_heads_of_their_own(phantom_cohort, external_cohort):
    internal, external = find_cases(CaseSource(phantom_cohort)), find_cases(CaseSource(external_cohort))
    assert [case.case_id for case in external] == [f"BraTS2021_{95000 + number}" for number in range(3)]
    assert not {case.patient_id for case in internal} & {case.patient_id for case in external}
    labels = [load_case(case).labels.tobytes() for case in (*internal, *external)]
    assert len(set(labels)) == 11


def test_a_longer_cohort_begins_with_the_cases_of_a_shorter_one(phantom_cohort, tmp_path):
    (folder,) = write_cohort(tmp_path, 1, 0, SHAPE, SPACING_MM)
    for path in folder.iterdir():
        assert path.read_bytes() == (phantom_cohort / folder.name / path.name).read_bytes()
    (other,) = write_cohort(tmp_path / "other", 1, 1, SHAPE, SPACING_MM)
    name = f"{folder.name}_flair.nii.gz"
    assert gzip.decompress((other / name).read_bytes()) != gzip.decompress((folder / name).read_bytes())


def test_a_writer_that_fails_leaves_whole_files_alone(tmp_path, monkeypatch):
    (folder,) = write_cohort(tmp_path, 1, 0, SHAPE, SPACING_MM)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    write_bytes = Path.write_bytes

    def fail(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        write_cohort(tmp_path, 1, 1, SHAPE, SPACING_MM)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


BAD_FLAGS = [
    (("--shape", "8", "8", "8"), "--shape"),
    (("--shape", "8", "120", "120"), "--shape"),
    (("--shape", "40", "120"), "--shape"),
    (("--shape", "0", "120", "120"), "--shape"),
    (("--shape", "-40", "120", "120"), "--shape"),
    (("--spacing-mm", "1", "1", "1"), "--spacing-mm"),
    (("--spacing-mm", "0", "2", "2"), "--spacing-mm"),
    (("--spacing-mm", "nan", "2", "2"), "--spacing-mm"),
    (("--spacing-mm", "400", "2", "2"), "--spacing-mm"),
    (("--cases", "0"), "--cases"),
    (("--cases", "6000"), "--cases"),
    (("--seed", "-1"), "--seed"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_flags_end_the_command_with_one_sentence(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.setattr(sys, "argv", ["make_phantom_v2.py", "--output", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stopped:
        run_command(make_phantom_v2.main, PhantomConfig, "")
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert len(message.splitlines()) == 1
    assert named in message
    assert not (tmp_path / "out").exists()


def test_a_style_that_does_not_exist_is_an_input_error():
    with pytest.raises(InputError, match="--style"):
        make_phantom(1, SHAPE, SPACING_MM, "martian")


def test_the_command_writes_a_cohort_and_its_preview(tmp_path, phantom_cohort):
    command = [sys.executable, REPOSITORY / "make_phantom_v2.py", "--output", tmp_path / "out"]
    flags = ["--cases", "2", "--shape", *map(str, SHAPE), "--spacing-mm", *map(str, SPACING_MM), "--preview"]
    done = subprocess.run(
        [*map(str, command), *flags], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 synthetic phantoms" in done.stdout
    assert len(find_cases(CaseSource(tmp_path / "out"), MODALITIES)) == 2
    name = "BraTS2021_90001/BraTS2021_90001_seg.nii.gz"
    assert (tmp_path / "out" / name).read_bytes() == (phantom_cohort / name).read_bytes()
    with Image.open(tmp_path / "out" / "preview.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 20
