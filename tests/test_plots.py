"""Plots: names are text and no formulas, and a plot that fails stops nothing."""

import logging
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from audit import overlays, plots

NAMES = ["a$b_{$ \\frac$ $x^2$ $$", r"\$ a" + "\udcff$b"]


def draw(path: Path, name: str) -> None:
    log = pd.DataFrame(
        {"epoch": [1, 2], "train_loss": [0.5, 0.4], "train_dice": [0, 1], "learning_rate": [1e-4, 1e-5]}
    )
    plots.plot_curves(path / "curves.png", log, name)
    rows = pd.DataFrame({"cohort": "internal", "region": "WT", "mode": "tta", "case": [name] * 3})
    rows = rows.assign(dice=[0.1, 0.5, 0.9], reference_ml=[1.0, 20.0, 300.0])
    plots.plot_dice_against_volume(path / "volume.png", rows, f" ({name})")
    volume, masks = np.arange(64.0).reshape(4, 4, 4), np.ones((1, 4, 4, 4), bool)
    overlays.plot_overlay(path / "overlay.png", name, volume, masks, ("WT",), (1, 1, 1))
    picture = overlays.take_picture(volume, masks[0], masks[0], (1, 1, 1))
    overlays.plot_ranked_cases(path / "cases.png", {name: picture}, name)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    is_formula = mpl.cbook.is_math_text
    monkeypatch.setattr(mpl.cbook, "is_math_text", lambda text: shown.append(text) or is_formula(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks
        draw(tmp_path, name)
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert all(text.startswith("$\\mathdefault{") for text in shown if "$" in text)  # ticks of a log axis


def test_the_ticks_of_a_logarithmic_axis_stay_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.semilogy([1, 2], [1e-5, 1e-4])
    axes.set_title("$x$")
    monkeypatch.setattr(plots, "write_atomically", lambda path, write: write(path))
    plots.save_figure(figure, tmp_path / "a.png")
    formulas = {text.get_text() for text in figure.findobj(Text) if text.get_parse_math()}
    assert "$\\mathdefault{10^{-4}}$" in formulas
    assert "$x$" not in formulas


def test_a_plot_that_fails_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError("no room\nleft")

    with caplog.at_level(logging.WARNING, "drunet"):
        plots.try_to_draw(tmp_path / "a.png", fail)
    assert caplog.messages == [f"{tmp_path / 'a.png'} is not drawn (OSError: no room left)"]
    with pytest.raises(KeyboardInterrupt):
        plots.try_to_draw(tmp_path / "a.png", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
