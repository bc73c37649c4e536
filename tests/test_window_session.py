"""A real session from the first click to the last: see window_session.py for what is done in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import napari_resfinetune as rf
from napari_resfinetune.cli.app import app
from napari_resfinetune.config import FinetuneConfig, read_config
from small_runs import weights
from window_session import TINY

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def session(cells, tmp_path_factory, xvfb_or_display) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("session")
    command = [sys.executable, str(HERE / "window_session.py"), str(cells), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def xvfb_or_display(qapp) -> None:
    """With a `QApplication` there is a display, which the session inherits."""


def test_it_trains_pauses_and_goes_on_to_the_end(session):
    assert session["after pause"] == "paused"
    assert session["first"]["problems"] == []
    assert (session["first"]["state"], session["first"]["status"]) == ("done", "finished")
    assert Path(session["first run"], "model.pt").is_file()


def test_the_run_is_compared_and_reported(session):
    assert {"comparison.json", "report.html"} <= set(session["files"])
    verdict = json.loads(Path(session["first run"], "comparison.json").read_text())["verdict"]
    headline = {"better": "Better", "worse": "Not better", "no clear difference": "No clear difference"}[verdict]
    assert session["headline"].startswith(f"{headline}: SA50 ")


def test_it_segments_and_follows_parameters_in_place(session):
    assert session["segment model"] == Path(session["first run"]).name
    assert session["followed in place"]


def test_it_corrects_and_continues_from_the_first_model(session):
    # The corrected labels take the place of those that the image had.
    assert ["c0", "c0 segmented"] in session["pairs"]
    assert [image for image, _ in session["pairs"]].count("c0") == 1
    assert session["second"]["model"] == session["first run"]
    assert session["second"]["status"] == "stopped"
    assert session["rounds"] == 2


def test_it_evaluates_layers_and_shows_errors(session):
    assert session["evaluated"]["n_true"] == 9
    assert session["error layer"]


def test_it_survives_the_death_of_its_engine(session):
    assert session["after crash"]["state"] == "failed"
    assert "killed (SIGKILL" in session["after crash"]["said"][0]
    assert session["layers as before"]
    assert session["went on"] == "done"


def test_the_window_never_imports_torch_and_leaves_nothing_behind(session):
    assert session["torch"] == []
    assert session["engine ended"] and session["folder removed"]


@pytest.fixture(scope="module")
def first(session) -> tuple[Path, FinetuneConfig]:
    """The first run of the window, which was paused and continued, and its configuration."""
    folder = Path(session["first run"])
    return folder, read_config(folder / "config.yaml")


def check_same(run: Path, first: tuple[Path, FinetuneConfig]) -> None:
    theirs, config = first
    again = read_config(run / "config.yaml")
    assert again.model_copy(update={"output": None}) == config.model_copy(update={"output": None})
    ours, expected = (weights(folder / "checkpoints" / "latest") for folder in (run, theirs))
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


def test_the_same_run_from_python_has_the_same_configuration_and_weights(first, tmp_path):
    rf.train(first[1], output=tmp_path / "again", isolate=True)
    check_same(tmp_path / "again", first)


def test_the_same_run_from_the_command_has_the_same_configuration_and_weights(first, tmp_path):
    data = first[1].data
    command = ["train", "--model", first[1].model, "--output", str(tmp_path / "again")]
    command += [part for file in data.images for part in ("--images", file)]
    command += [part for file in data.labels for part in ("--labels", file)]
    for section, settings in TINY.items():
        for name, value in settings.items():
            command += ["--set", f"{section}.{name}={value}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    check_same(tmp_path / "again", first)
