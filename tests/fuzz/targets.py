"""The readers that are given damaged files, and the whole files that the damage starts from."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import nibabel as nib
import numpy as np
import torch

from audit import output as inference_output
from audit.compare import read_rows
from audit.facts import check_facts
from audit.results import read_summary
from cohort.cache import open_entry, read_facts, write_entry
from cohort.cases import Case, load_case
from cohort.layouts import CaseSource, find_cases
from cohort.leakage import read_different
from cohort.patients import map_patients
from cohort.split import read_split, split_cases, split_sha256
from inference_v2 import load_model
from model_drunet_v2 import DRUNetV2
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.command import from_plain, to_plain
from runtime.errors import InputError
from runtime.files import is_written_by_us, read_json, write_output
from tests.fuzz.mutate import mend_png, mutate_bytes, mutate_plain
from training.settings import TrainConfig

SEEDS = Path(__file__).parent / "seeds"
SHAPE = (5, 6, 4)  # X, Y, Z of the volumes
CPU = torch.device("cpu")
CASES = [
    Case(name, name, "made", "brats2021", "brats", {"flair": (Path("x.nii"),)}, ())
    for name in ("BraTS2021_00000", "BraTS2021_00001", "case-7")
]
CONFIG = {"modalities": ["flair"], "regions": ["WT"], "context": 1, "size": 32, "widths": [4, 8]}
SPACING = {"in_plane": {"median": 1.0, "low": 0.9, "high": 1.1}}
SPACING |= {"slices": {"median": 3.0, "low": 2.0, "high": 4.0}}
FACTS = {
    "config": CONFIG,
    "thresholds": [0.45],
    "postprocessing": {
        "settings": {"WT": {"fill_holes": True, "min_component_mm3": 50.0, "min_total_mm3": 0.0}}
    },
    "data_kind": "phantom",
    "epoch": 3,
    "validation_dice": 0.7,
    "spacing_mm": SPACING,
    "reference_ml": {"WT": [3.5, 90.0]},
}


@dataclass(frozen=True)
class Target:
    """One reader."""

    seeds: Callable[[], list[bytes]]  # whole files
    read: Callable[[Path], Any]  # gives what was read in a form that `==` compares
    name: str = "file"  # of the file that is damaged, in a folder of its own
    head: int = 0  # bytes of the header, which gets half of the damage
    rebuild: Callable[[bytes, random.Random], bytes] | None = None  # damage under a right checksum or hash
    is_hashed: bool = False  # what is read of a damaged file must be what was there


def damage(target: Target, seeds: list[bytes], rng: random.Random) -> tuple[bytes, bytes, bool]:
    """Return a whole file, a damaged one, and whether its hash must show the damage."""
    whole, other = rng.choice(seeds), rng.choice(seeds)
    if target.rebuild and rng.random() < 0.5:
        return whole, target.rebuild(whole, rng), False
    return whole, mutate_bytes(whole, other, rng, target.head), target.is_hashed


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode()


def rebuild_json(whole: bytes, rng: random.Random) -> bytes:
    """Return a JSON file with other values."""
    return _json(mutate_plain(json.loads(whole), rng))


def in_folder(write: Callable[[Path], Any]) -> Any:
    """Return what `write` makes in a folder that is gone afterwards."""
    # torch writes the name of a temporary file, with the number of the process, into a checkpoint
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.getpid", return_value=1):
        return write(Path(folder))


# ------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------


def nifti_seeds() -> list[bytes]:
    """Volumes of several types and versions, and a mask."""
    rng = np.random.default_rng(0)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    arrays = [rng.integers(0, 900, SHAPE).astype(np.int16), rng.random(SHAPE).astype(np.float32)]
    arrays += [rng.choice([0, 1, 2, 4], SHAPE).astype(np.uint8), rng.random((*SHAPE, 1)).astype(np.float32)]
    images = [nib.Nifti1Image(array, affine) for array in arrays] + [nib.Nifti2Image(arrays[0], affine)]
    return [image.to_bytes() for image in images]


def read_case(path: Path, layout: str = "brats2021", mask: bool = True) -> Any:
    """Read a file as a modality and as a mask."""
    paths = (path,)
    case = Case("x", "x", "made", layout, "brats", {"flair": paths}, paths if mask else ())
    read = load_case(dataclasses.replace(case, mask=()), ("flair",))
    if mask:
        with contextlib.suppress(InputError):  # most values are no labels
            load_case(case, ("flair",))
    return (*read.volume.shape, float(np.abs(read.volume).max(initial=0)))


def rebuild_gz(whole: bytes, rng: random.Random) -> bytes:
    """Return a .gz of damaged content, with a right checksum."""
    return gzip.compress(mutate_bytes(gzip.decompress(whole), b"", rng, 400), 1)


def picture_seeds(suffix: str) -> list[bytes]:
    """Grey and RGB pictures of 8 and 16 bits."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 255, (12, 10)).astype(np.uint8),
        rng.integers(0, 999, (12, 10)).astype(np.uint16),
    ]
    arrays += [rng.integers(0, 255, (12, 10, 3)).astype(np.uint8)]
    return [cv2.imencode(suffix, array)[1].tobytes() for array in arrays]


def stack_seeds() -> list[bytes]:
    """Pictures of one page and stacks of three."""
    rng = np.random.default_rng(0)

    def write(folder: Path) -> bytes:
        cv2.imwritemulti(str(folder / "x.tif"), list(rng.integers(0, 255, (3, 12, 10)).astype(np.uint8)))
        return (folder / "x.tif").read_bytes()

    return [*picture_seeds(".tif"), in_folder(write)]


def rebuild_png(whole: bytes, rng: random.Random) -> bytes:
    """Return a PNG of damaged chunks, with right checksums."""
    return mend_png(mutate_bytes(whole, b"", rng, 40))


# ------------------------------------------------------------------------------------------------------------
# Tables and JSON
# ------------------------------------------------------------------------------------------------------------


def mapping_seeds() -> list[bytes]:
    """Sheets with each separator, with quotes, a mark, no-break spaces and UTF-16."""
    sheet = 'BraTS2021,Site,"Local, ID"\r\nBraTS2021_00000,x,"a ""b"""\r\nBraTS2021_00001,x,TCGA-02-0001\r\n'
    plain = "case\tpatient\ncase-7\t1\nBraTS2021_00000\t1\n"
    texts = [sheet.encode(), sheet.replace(",", ";").encode("utf-8-sig"), plain.encode()]
    return [*texts, f"{plain}\xa0".encode("latin-1"), plain.encode("utf-16")]


def read_mapping(path: Path) -> Any:
    """Read a sheet found beside the cases, and one that was given."""
    map_patients(CASES, [path])
    return [case.patient_id for case in map_patients(CASES, [], path)]


def split_seeds() -> list[bytes]:
    """Two splits."""
    ids = [f"case-{number}" for number in range(7)]
    cases = [dataclasses.replace(CASES[0], case_id=name, patient_id=name) for name in ids]
    return [_json(split_cases(cases, seed)) for seed in (0, 1)]


def rebuild_split(whole: bytes, rng: random.Random) -> bytes:
    """Return a split with other values and, where it has parts, their right hash."""
    split = mutate_plain(json.loads(whole), rng)
    if isinstance(split, dict) and {"train", "validation", "test"} <= split.keys():
        split["sha256"] = split_sha256(split)
    return _json(split)


def read_split_ids(path: Path) -> Any:
    """Return the ids of a split file, of which its hash is."""
    split = read_split(path)
    return [split[part] for part in ("train", "validation", "test")]


def metrics_seeds() -> list[bytes]:
    """The test rows of two cases."""
    head = "cohort,case,patient,region,mode,seen_in_training,dice,hd95_mm,nsd_1mm,lesion_dice,lesion_hd95_mm,"
    rows = [
        f"internal,{number},p{number},WT,{mode},False,0.71,3.5,0.4,0.5,9.0,73.0"
        for number in ("007", "b")
        for mode in ("plain", "tta")
    ]
    return ["\n".join([f"{head}reference_ml", *rows, ""]).encode()]


def read_metrics(path: Path) -> Any:
    """Read the rows of an audited run, as --compare does."""
    return read_rows(path.parent.parent)["dice"].sum() * 0


def dataset_seeds() -> list[bytes]:
    """A dataset.json of each version of nnU-Net, and one of regions."""
    first = {"modality": {"0": "FLAIR"}, "labels": {"0": "background", "1": "edema", "2": "enhancing"}}
    second = {"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "edema": 1, "enhancing": 2}}
    regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing": [3]}
    return list(map(_json, (first, second, {**second, "labels": regions})))


def read_dataset(path: Path) -> Any:
    """Find the cases beside a dataset.json."""
    images = path.parent / "imagesTr"
    images.mkdir(exist_ok=True)
    (images / "a_0000.nii.gz").touch()
    return [case.case_id for case in find_cases(CaseSource(str(path.parent)), ("flair",))]


def read_config(path: Path) -> Any:
    """Return the settings of --config."""
    return to_plain(from_plain(TrainConfig, read_json(path, "--config", "a run's config.json")))


def finished_seeds() -> list[bytes]:
    """The list of finished cases that inference goes on from."""

    def write(folder: Path) -> bytes:
        made = inference_output.Output(folder, ("WT",))
        for case in CASES:
            rows = [{"case": case.case_id, "region": "WT", "volume_ml": 12.5}]
            inference_output.note_finished(made, case, [["x", 1, 2]], rows)
        return (folder / inference_output.FINISHED).read_bytes()

    return [in_folder(write)]


def read_finished(path: Path) -> Any:
    """Return how many rows of finished cases are other than they were written."""
    done = inference_output.read_finished(path.parent)
    rows = [(entry["case"], row["volume_ml"]) for entry in done.values() for row in entry["rows"]]
    return all(volume == 12.5 and any(case == one.case_id for one in CASES) for case, volume in rows)


def written_seeds() -> list[bytes]:
    """The list of files that this program wrote into a folder."""

    def write(folder: Path) -> bytes:
        for name in ("a.txt", "b.txt"):
            write_output(folder / name, lambda target: target.write_text("ours"))
        return (folder / ".drunet_written").read_bytes()

    return [in_folder(write)]


def read_written_list(path: Path) -> Any:
    """Return whether a file of somebody else counts as ours."""
    (path.parent / "a.txt").write_text("theirs")
    return is_written_by_us(path.parent / "a.txt")


# ------------------------------------------------------------------------------------------------------------
# Networks and the cache
# ------------------------------------------------------------------------------------------------------------


def network_content() -> dict[str, Any]:
    """Return what a best.pt holds, of a tiny network."""
    torch.manual_seed(0)
    return {"model": DRUNetV2(3, 1, (4, 8)).state_dict(), **FACTS}


def checkpoint_seeds() -> list[bytes]:
    """A best.pt, and a checkpoint with an optimiser's state."""
    more = {"optimizer": {"state": {0: {"exp_avg": torch.ones(40)}}}, "seen_thumbnails": torch.ones(9)}

    def write(folder: Path, content: dict[str, Any]) -> bytes:
        save_checkpoint(folder / "best.pt", content)
        return (folder / "best.pt").read_bytes()

    return [in_folder(functools.partial(write, content=network_content() | extra)) for extra in ({}, more)]


def plain_content(content: Any) -> Any:
    """Return a checkpoint's content in a form that `==` compares."""
    if isinstance(content, torch.Tensor):
        return (str(content.dtype), content.shape, content.numpy().tobytes())
    if isinstance(content, dict):
        return {key: plain_content(value) for key, value in content.items()}
    return tuple(map(plain_content, content)) if isinstance(content, list | tuple) else content


def read_checkpoint(path: Path) -> Any:
    """Return what a checkpoint holds."""
    content = load_checkpoint(path)
    check_facts(path, content)
    return plain_content(content)


def rebuild_checkpoint(whole: bytes, rng: random.Random) -> bytes:
    """Return a checkpoint with other facts and a right hash."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    changed = mutate_plain(FACTS, rng)
    content = {name: value for name, value in content.items() if name not in FACTS}

    def write(folder: Path) -> bytes:
        save_checkpoint(folder / "x.pt", content | (changed if isinstance(changed, dict) else {}))
        return (folder / "x.pt").read_bytes()

    return in_folder(write)


@functools.cache
def onnx_seeds() -> tuple[bytes, ...]:
    """An exported network."""
    import export_v2

    def write(folder: Path) -> bytes:
        save_checkpoint(folder / "best.pt", network_content())
        export_v2.main(export_v2.ExportConfig(checkpoint=str(folder / "best.pt")))
        return (folder / "model.onnx").read_bytes()

    return (in_folder(write),)


def rebuild_onnx(whole: bytes, rng: random.Random) -> bytes:
    """Return an ONNX file with other metadata and a right hash."""
    import onnx

    from runtime.onnx_file import NO_HASH, seal

    model = onnx.load_from_string(whole)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    name = rng.choice(sorted(properties))
    if rng.random() < 0.5 and name not in ("format", "file_sha256"):
        properties[name] = json.dumps(mutate_plain(json.loads(properties[name]), rng))
    else:
        damaged = mutate_bytes(properties[name].encode(), b"", rng)
        properties[name] = damaged.decode("utf-8", errors="replace")
    properties["file_sha256"] = NO_HASH
    onnx.helper.set_model_props(model, properties)
    return seal(model.SerializeToString())


def read_onnx(path: Path) -> Any:
    """Return what an exported file says of its network."""
    return load_model(path, CPU).checkpoint


def facts_seeds() -> list[bytes]:
    """The facts of an entry of the cache."""
    return [in_folder(lambda folder: (_write_entry(folder) / "facts.json").read_bytes())]


def _write_entry(folder: Path) -> Path:
    volume = np.zeros((1, 3, 8, 8), np.float16)
    volume[0, 1, 2:5, 3:6] = 1.5
    masks = np.zeros((2, 3, 8, 8), bool)
    masks[:, 1, 3, 4] = True
    notes = {"spacing_known": True, "warnings": ["odd"]}
    write_entry(folder / "entries" / "x", volume, masks, (2, 1, 1), {"image_sha256": "0"}, notes)
    return folder / "entries" / "x"


def read_cache_facts(path: Path) -> Any:
    """Read an entry whose facts are damaged; None where it is made again."""
    folder = path.parent
    if not (folder / "volume.npy").exists():
        for array in in_folder(_read_arrays):
            (folder / array[0]).write_bytes(array[1])
    facts = read_facts(folder)
    if facts is None:
        return None
    prepared = open_entry(CASES[0], folder, facts)
    prepared.slab(1, 1)
    prepared.reference_slice(1)
    return facts


def _read_arrays(folder: Path) -> list[tuple[str, bytes]]:
    entry = _write_entry(folder)
    return [(name, (entry / name).read_bytes()) for name in ("volume.npy", "masks.npy")]


TARGETS = {
    "nifti": Target(nifti_seeds, read_case, "x_flair.nii", head=352),
    "gz": Target(
        lambda: [gzip.compress(seed, 1, mtime=0) for seed in nifti_seeds()],
        read_case,
        "x_flair.nii.gz",
        head=20,
        rebuild=rebuild_gz,
    ),
    "png": Target(
        lambda: picture_seeds(".png"),
        functools.partial(read_case, layout="slices"),
        "x_1.png",
        head=33,
        rebuild=rebuild_png,
    ),
    "tif": Target(stack_seeds, functools.partial(read_case, layout="slices"), "x_1.tif", head=8),
    "mapping": Target(mapping_seeds, read_mapping, "mapping.csv"),
    "different": Target(
        lambda: [b"case,other\na,b\nc,d\n"], lambda path: len(read_different(path)), "different.csv"
    ),
    "split": Target(split_seeds, read_split_ids, "split.json", rebuild=rebuild_split, is_hashed=True),
    "checkpoint": Target(
        checkpoint_seeds, read_checkpoint, "best.pt", rebuild=rebuild_checkpoint, is_hashed=True
    ),
    "onnx": Target(lambda: list(onnx_seeds()), read_onnx, "x.onnx", rebuild=rebuild_onnx, is_hashed=True),
    "facts": Target(facts_seeds, read_cache_facts, "facts.json", rebuild=rebuild_json, is_hashed=True),
    "config": Target(
        lambda: [_json(to_plain(TrainConfig())), _json({"size": 128, "widths": [8, 16], "data_dir": "d"})],
        read_config,
        "config.json",
        rebuild=rebuild_json,
    ),
    "metrics": Target(metrics_seeds, read_metrics, "evaluation/metrics_per_case.csv"),
    "summary": Target(
        lambda: [_json({"data_kind": "real", "predictions": {"folder": "/x"}, "cohorts": {}})],
        read_summary,
        "summary.json",
        rebuild=rebuild_json,
    ),
    "dataset": Target(dataset_seeds, read_dataset, "dataset.json", rebuild=rebuild_json),
    "finished": Target(finished_seeds, read_finished, ".drunet_cases", is_hashed=True),
    "written": Target(written_seeds, read_written_list, ".drunet_written", is_hashed=True),
}
