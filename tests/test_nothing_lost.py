"""What goes wrong around a training run costs none of its work: logs, plots, folders, names, damage."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import train_drunet_v2
from audit import plots
from cohort.selection import TrainingSource
from runtime import epoch_log
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.errors import InputError
from runtime.files import file_sha256
from runtime.log import close_log, log_to_file
from runtime.log import log as says
from tests.kill_trials import compare
from train_drunet_v2 import choose_settings, main
from training.settings import TrainConfig

ExpectInputError = Callable[..., AbstractContextManager[None]]


def train(**settings: Any) -> None:
    """Run training in this process and this folder, as small as it gets."""
    try:
        main(dataclasses.replace(TINY, **settings))
    finally:
        close_log()
        says.setLevel(logging.INFO)


def resume(folder: str, **typed: Any) -> None:
    """Go on with a run, with some settings typed."""
    train(**vars(choose_settings(lambda defaults=None: _typed(defaults, resume=folder, **typed))))


def _typed(defaults: TrainConfig | None, **typed: Any) -> TrainConfig:
    return dataclasses.replace(defaults or TrainConfig(), **typed)


TINY = TrainConfig(
    size=48,
    widths=(4, 8),
    batch_size=8,
    slabs_per_epoch=16,
    workers=0,
    learning_rate=1e-2,
    warmup_steps=0,
    device="cpu",
    epochs=2,
    probe=False,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantom_cohort: Path) -> Path:
    """A folder with a run of two epochs, results/made."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(run="made", source=TrainingSource(str(phantom_cohort)))
    return folder


@pytest.fixture
def made(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that run, results/made in the folder of this test."""
    monkeypatch.chdir(tmp_path)
    says.setLevel(logging.INFO)
    shutil.copytree(finished / "results", tmp_path / "results")
    (tmp_path / "cache").symlink_to(finished / "cache")
    yield Path("results/made")
    close_log()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir() if path.is_file()}


# ------------------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------------------


def test_a_damaged_last_checkpoint_costs_one_epoch(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, text = load_checkpoint(made / "last.pt"), (made / "log.csv").read_text()
    damaged = bytearray((made / "last.pt").read_bytes())
    damaged[len(damaged) // 3] ^= 1
    (made / "last.pt").write_bytes(damaged)
    resume("results/made")
    assert "goes on from the epoch before" in caplog.text
    assert "goes on from the epoch before" in (made / "train.log").read_text()
    again = load_checkpoint(made / "last.pt")
    assert again["epoch"] == 2
    for name, value in whole["network"].items():
        assert torch.equal(again["network"][name], value)
    columns = ["epoch", "train_loss", "validation_dice_WT"]
    before, after = (pd.read_csv(made / "log.csv"), pd.DataFrame(whole["log"]).apply(pd.to_numeric))
    assert before[columns].equals(after[columns])
    assert text.splitlines()[:2] == (made / "log.csv").read_text().splitlines()[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_of_1350_flipped_bits_none_changes_what_is_read(name: str, made: Path) -> None:
    whole, expected = (made / name).read_bytes(), load_checkpoint(made / name)
    assert compare(load_checkpoint(made / name), expected) == []
    refused, changed = 0, []
    for bit in np.random.default_rng(0).choice(8 * len(whole), 1350, replace=False).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (made / name).write_bytes(flipped)
        try:
            changed += [(bit, places) for places in compare(load_checkpoint(made / name), expected)]
        except InputError:
            refused += 1
    print(f"{name}: {refused} refused")  # the other bits lie in padding and the like
    assert not changed
    assert refused > 600


def test_a_run_killed_before_post_processing_does_not_train_on(made: Path) -> None:
    last = load_checkpoint(made / "last.pt")
    config = last["config"] | {"early_stop": 1, "epochs": 9}
    save_checkpoint(made / "last.pt", last | {"best_epoch": 1, "config": config})
    best = load_checkpoint(made / "best.pt")
    save_checkpoint(
        made / "best.pt", {name: value for name, value in best.items() if name != "postprocessing"}
    )
    before = file_sha256(made / "last.pt")
    resume("results/made")
    assert file_sha256(made / "last.pt") == before
    again = load_checkpoint(made / "best.pt")
    assert again["postprocessing"] == best["postprocessing"]
    assert again["epoch"] == best["epoch"]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_killed_between_its_last_checkpoint_and_its_log_has_all_of_the_log(
    made: Path, rows: int
) -> None:
    whole = (made / "log.csv").read_text()
    (made / "log.csv").write_text("".join(whole.splitlines(keepends=True)[: rows + 1 if rows else 0]))
    (made / "curves.png").unlink()
    resume("results/made")
    assert (made / "log.csv").read_text() == whole
    assert (made / "curves.png").stat().st_size > 1000


def test_an_epoch_is_kept_where_its_plot_and_its_log_fail(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(plots, "plot_curves", fail)
    resume("results/made", epochs=3)
    assert "curves.png is not drawn (ValueError: no such font)" in caplog.text
    assert load_checkpoint(made / "last.pt")["epoch"] == 3
    assert pd.read_csv(made / "log.csv")["epoch"].tolist() == [1, 2, 3]

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device", "results/made/log.csv")

    with monkeypatch.context() as patch:
        patch.setattr(epoch_log, "write_rows", fill)
        with pytest.raises(OSError, match="No space"):
            resume("results/made", epochs=4)
    assert load_checkpoint(made / "last.pt")["epoch"] == 4
    resume("results/made", epochs=5)
    assert pd.read_csv(made / "log.csv")["epoch"].tolist() == [1, 2, 3, 4, 5]


def test_a_folder_that_vanishes_is_written_again(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    split, validate = (made / "split.json").read_bytes(), train_drunet_v2.validate

    def vanish(*arguments: Any) -> Any:
        shutil.rmtree(made)
        return validate(*arguments)

    monkeypatch.setattr(train_drunet_v2, "validate", vanish)
    resume("results/made", epochs=3)
    assert "split.json is gone, and written again" in caplog.text
    assert "best.pt is gone: this epoch is kept in its place" in caplog.text
    assert (made / "split.json").read_bytes() == split
    names = {path.name for path in made.iterdir()}
    pages = {"index.html", "MODEL_CARD.md", ".drunet_written"}
    files = {"config.json", "split.json", "log.csv", "curves.png", "best.pt", "last.pt", "train.log"}
    assert names == files | pages
    assert load_checkpoint(made / "best.pt")["epoch"] == load_checkpoint(made / "last.pt")["epoch"] == 3
    assert pd.read_csv(made / "log.csv")["epoch"].tolist() == [1, 2, 3]


def test_a_run_named_like_a_formula_is_drawn_under_its_name(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = Path("results/a$b_{$ \\frac$")
    made.rename(named)
    resume(str(named), epochs=3)
    assert "not drawn" not in caplog.text
    assert load_checkpoint(named / "last.pt")["epoch"] == 3


# ------------------------------------------------------------------------------------------------------------
# log.csv
# ------------------------------------------------------------------------------------------------------------

FOREIGN = {
    "another run's": b"epoch,minutes,train_loss\n1,0.5,0.25\n2,1.0,0.125\n",
    "of other columns": b"epoch,x\n1,2\n",
    "no table": b"\x00\xff\xfe garbage \x9f" * 50,
    "a table of something else": b"case,dice\na,0.5\n",
    "epochs that are no numbers": b"epoch\none\n",
    "ragged": b"epoch,minutes\n1,2,3,4,5\n1\n",
    "nothing but quotes": b'"""',
}


@pytest.mark.parametrize("is_old", [False, True], ids=["", "checkpoint without log"])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_log_that_is_not_the_runs_is_refused_and_stays(
    content: bytes, is_old: bool, tmp_path: Path, input_error: ExpectInputError
) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    rows = [{"epoch": str(n), "minutes": f"{n / 8}", "train_loss": "0.5"} for n in (1, 2)]
    checkpoint = {"epoch": 1 if b"x" in content else 2, "minutes": 0.251} | ({} if is_old else {"log": rows})
    with input_error(path, "not the log of this run"):
        epoch_log.resume_rows(path, checkpoint)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kept", ["", "\n \n", None, "epoch,minutes,train_loss\n1,0.12,0.1000\n"])
def test_a_log_that_is_empty_or_short_is_written_again(
    kept: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.csv"
    rows = [{"epoch": "1", "minutes": "0.12", "train_loss": "0.1000"}]
    rows += [{"epoch": "2", "minutes": "0.25", "train_loss": "1e-5", "new": "7"}]
    if kept is not None:
        path.write_text(kept)
    found = epoch_log.resume_rows(path, {"epoch": 2, "minutes": 0.25, "log": rows})
    assert found == rows
    assert f"{path} has" in caplog.text
    table = epoch_log.write_rows(path, found)
    assert path.read_text() == "epoch,minutes,train_loss,new\n1,0.12,0.1000,\n2,0.25,1e-5,7\n"
    assert table["train_loss"].tolist() == [0.1, 1e-5]
    assert table["new"].isna().tolist() == [True, False]
    caplog.clear()
    assert epoch_log.resume_rows(path, {"epoch": 2, "minutes": 0.25, "log": rows}) == rows
    # of a version that had the log in log.csv alone; and from the checkpoint before
    assert epoch_log.resume_rows(path, {"epoch": 2, "minutes": 0.2512}) == rows
    assert epoch_log.resume_rows(path, {"epoch": 1, "minutes": 0.12, "log": rows[:1]}) == rows[:1]
    assert not caplog.messages


def test_a_refused_resume_leaves_the_run_as_it_was(made: Path, input_error: ExpectInputError) -> None:
    (made / "log.csv").write_bytes(FOREIGN["another run's"])
    before = hashes(made)
    with input_error("log.csv", "move it away"):
        resume("results/made", epochs=3)
    after = hashes(made)
    for name in ("last.pt", "last_before.pt", "best.pt", "log.csv", "split.json", "curves.png"):
        assert after[name] == before[name]


# ------------------------------------------------------------------------------------------------------------
# train.log
# ------------------------------------------------------------------------------------------------------------


def test_a_log_file_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    says.setLevel(logging.INFO)
    monkeypatch.setattr(says, "propagate", False)  # pytest's processes cannot tell each other such a line
    folder = tmp_path / "run"
    folder.mkdir()
    try:
        log_to_file(folder / "train.log")
        says.info("first")
        shutil.rmtree(folder)
        says.info("second")
        says.info("third \udcff")
        folder.mkdir()
        says.info("fourth \udcff")
    finally:
        close_log()
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert out.count("is not written") == 1
    assert (folder / "train.log").read_text().endswith("fourth \\udcff\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device there")
def test_a_full_disk_under_the_log_file_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    says.setLevel(logging.INFO)
    try:
        log_to_file(Path("/dev/full"))
        for _ in range(3):
            says.info("a line")
    finally:
        close_log()
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert out.count("is not written") == 1
