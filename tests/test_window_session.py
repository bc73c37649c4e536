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

import napari_resfinetune as rf
from napari_resfinetune.config import read_config
from small_runs import weights

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


def test_it_segments_and_follows_parameters_in_place(session):
    assert session["segment model"] == Path(session["first run"]).name
    assert session["followed in place"]


def test_it_corrects_and_continues_from_the_first_model(session):
    assert session["pairs"] == 4
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


def test_the_same_run_from_python_has_the_same_configuration_and_weights(session, tmp_path):
    """Also paused and continued: it is the same run."""
    first = Path(session["first run"])
    config = read_config(first / "config.yaml")
    rf.train(config, output=tmp_path / "again", isolate=True)
    again = read_config(tmp_path / "again" / "config.yaml")
    assert again.model_copy(update={"output": None}) == config.model_copy(update={"output": None})
    ours, theirs = (weights(run / "checkpoints" / "latest") for run in (tmp_path / "again", first))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
