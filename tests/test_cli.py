"""The command: what it prints where, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from napari_resfinetune.cli import demo
from napari_resfinetune.cli.app import app
from napari_resfinetune.data.sources import open_array
from napari_resfinetune.models import load_model, save_model

QUICK = [
    "training.input_px=128",
    "data.patch_px=64",
    "training.epochs=1",
    "training.samples_per_epoch=2",
    "training.compare=false",
    "training.report=false",
]


def call(*arguments: object, status: int = 0):
    """Run the command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Return folders with three images of squares, and a start model."""
    folder = tmp_path_factory.mktemp("cells of mine")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(3):
        labels = np.zeros((96, 96), np.uint8)
        for j, (y, x) in enumerate(np.ndindex(3, 3)):
            labels[8 + 28 * y : 24 + 28 * y, 8 + 28 * x : 24 + 28 * x] = j + 1
        image = (np.where(labels > 0, 150, 20) + rng.integers(0, 30, labels.shape)).astype(np.uint8)
        tifffile.imwrite(folder / "images" / f"ü{i}.tif", image)
        tifffile.imwrite(folder / "labels" / f"ü{i}.tif", labels)
    save_model(folder / "start.pt", load_model("random:vit_t", decoder="new", seed=3))
    return folder


def where(cells):
    return ["--images", cells / "images", "--labels", cells / "labels"]


def quick():
    return [part for setting in QUICK for part in ("--set", setting)]


def test_from_images_to_scores(cells, tmp_path):
    checked = json.loads(call("check", *where(cells), "--json").stdout)
    assert checked["errors"] == []
    run = tmp_path / "run"
    trained = call("train", *where(cells), "--model", cells / "start.pt", "--output", run, *quick(), "--json")
    result = json.loads(trained.stdout)
    fields = {"run_dir", "status", "best_epoch", "best_metric", "peak_memory_gb", "seconds", "comparison"}
    assert set(result) == fields
    assert result["status"] == "finished"
    again = json.loads(call("resume", run, "--json").stdout)
    assert again["best_metric"] == result["best_metric"]
    out = tmp_path / "out"
    one = cells / "images" / "ü0.tif"
    segmented = json.loads(call("segment", "--images", one, "--model", run, "--output", out, "--json").stdout)
    labels = tifffile.imread(out / "ü0.tif")
    assert (labels.shape, labels.dtype) == ((96, 96), np.uint32)
    assert segmented["results"][0]["objects"] == len(np.unique(labels[labels > 0]))
    again = json.loads(call("segment", "--images", one, "--model", run, "--output", out, "--json").stdout)
    assert [result["kept"] for result in segmented["results"] + again["results"]] == [False, True]
    other = ("--set", "data.patch_px=96")
    refused = call("segment", "--images", one, "--model", run, "--output", out, *other, status=2)
    assert "--overwrite" in refused.stderr
    pyramid = ("--format", "zarr", "--json")
    zarr = json.loads(call("segment", "--images", one, "--model", run, "--output", out, *pyramid).stdout)
    assert np.array_equal(open_array(zarr["results"][0]["labels"]).read(), labels)
    table = tmp_path / "scores.csv"
    scored = call(
        "evaluate", "--images", one, "--labels", cells / "labels" / "ü0.tif", "--model", run,
        "--mode", "ais", "--mode", "box", "--csv", table, "--json",
    )  # fmt: skip
    scores = json.loads(scored.stdout)
    assert set(scores) == {"ais", "box"}
    assert all(0 <= scores[mode][name] <= 1 for mode in scores for name in ("sa50", "sa75", "msa"))
    assert len(table.read_text(encoding="utf-8").splitlines()) == 3
    several = ["evaluate", "--images", one, "--labels", cells / "labels" / "ü0.tif", "--model", run]
    several += ["--model", cells / "start.pt"]
    compared = json.loads(call(*several, "--json").stdout)
    assert list(compared) == [str(run), str(cells / "start.pt")]
    assert compared[str(run)]["ais"] == scores["ais"]
    shown = call(*several).stdout
    assert "95 %" in shown and "interval" in shown
    page = json.loads(call("report", run, "--json").stdout)["report"]
    assert page == str(run / "report.html")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process; nobody's shared runner")
def test_ctrl_c_saves_and_resume_goes_on(cells, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from napari_resfinetune.cli import main; main()", "train", *where(cells)]
    command += ["--model", cells / "start.pt", "--output", run, *quick(), "--set", "training.epochs=40"]
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        events = run / "events.jsonl"
        deadline = time.monotonic() + 120
        while not (events.is_file() and '"Step"' in events.read_text(encoding="utf-8")):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "resfinetune resume" in errors.decode()
    assert (run / "checkpoints" / "latest" / "optimizer.pt").is_file()
    taken = events.read_text(encoding="utf-8").count('"Step"')
    call("resume", run, "--epochs", (taken + 1) // 2 + 1)
    assert (run / "model.pt").is_file()


def test_plan_says_what_a_run_would_take_and_refuses_what_does_not_fit(cells):
    small = [*where(cells), "--model", cells / "start.pt", *quick(), "--set", "resources.device=cpu"]
    said = call("plan", *small, "--json")
    plan = json.loads(said.stdout)
    assert plan["fits"]
    assert 1 < plan["peak_gb"] < 8
    assert plan["seconds_per_epoch"] > 0
    said = call("plan", *small, "--set", "resources.memory_gb=0.5", status=3)
    assert "does not fit" in said.stdout
    assert "resources.checkpoint_encoder=true" in said.stdout
    assert "preset" in call("plan", *small, "--preset", "gtx108", status=2).stderr


def test_the_demo_makes_a_model_and_a_picture(tmp_path, monkeypatch):
    settings = {**demo.SETTINGS["training"], "epochs": 1, "samples_per_epoch": 2, "compare": False, "report": False}
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "training": settings})
    monkeypatch.setattr(demo, "SCENE_SHAPE", (512, 1280))
    outcome = json.loads(call("demo", "--output", tmp_path / "demo", "--json").stdout)
    assert 0 <= outcome["after"]["sa50"] <= 1
    assert (tmp_path / "demo" / "run" / "model.pt").is_file()
    assert (tmp_path / "demo" / "before-after.png").stat().st_size > 10_000
    training, held_out = demo.cut_scene()
    assert {sample.image.shape for sample in training} == {(256, 256)}
    assert {sample.image.shape for sample in held_out} == {(512, 512)}


def test_doctor_says_what_is_there():
    report = json.loads(call("doctor", "--json").stdout)
    assert report["device"] in ("cpu", "cuda", "mps")
    assert report["packages"]["micro-sam"]
    assert report["network"] is False
    assert any("no network" in advice for advice in report["advice"])
    text = call("doctor").stdout
    assert report["preset"] in text
    assert "number format" in text


def test_every_verb_explains_itself():
    for verb in ("doctor", "demo", "check", "train", "resume", "segment", "evaluate", "report"):
        assert "--help" in call(verb, "--help").output
