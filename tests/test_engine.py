"""The engine process through its client: what it answers, and how it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile

from napari_resfinetune.config import make_config
from napari_resfinetune.widgets.engine_client import EngineClient

# Loading torch beside other work takes most of it.
WAIT_SECONDS = 900


@pytest.fixture(scope="module")
def engine(qapp, tmp_path_factory):
    client = EngineClient(tmp_path_factory.mktemp("engine"))
    yield client
    client.close(wait_seconds=10)


def until(condition: Any, seconds: float = WAIT_SECONDS) -> None:
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        QApplication.processEvents()
        time.sleep(0.01)


def answer(engine: EngineClient, verb: str, **request: Any) -> dict[str, Any]:
    """Ask, wait, and return the result, or the problems under "problems"."""
    got: list[dict[str, Any]] = []
    engine.ask(verb, on_result=got.append, on_error=lambda problems: got.append({"problems": problems}), **request)
    until(lambda: got)
    return got[0]


def pairs(cells: Path) -> list[dict[str, Any]]:
    files = sorted((cells / "images").iterdir())
    return [{"image": str(file), "labels": str(cells / "labels" / file.name), "held_out": None} for file in files]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_name_that_is_no_text_gets_an_answer(engine, cells, tmp_path):
    strange = os.fsdecode(b"\xff.tif")
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        shutil.copy(cells / kind / "c0.tif", tmp_path / kind / strange)
    found = answer(engine, "open_folders", images=str(tmp_path / "images"), labels=str(tmp_path / "labels"))
    assert [pair["image"] for pair in found["pairs"]] == [str(tmp_path / "images" / strange)]


def test_pairs_are_checked_and_split(engine, cells):
    found = answer(engine, "check", pairs=pairs(cells), data={"patch_px": 64}, seed=0)
    assert [row["objects"] for row in found["pairs"]] == [9, 9, 9]
    assert sorted(row["part"] for row in found["pairs"]) == ["held out", "train", "train"]
    assert found["note"] == "2 images to train on, 1 held out"
    chosen = [{**pair, "held_out": number == 0} for number, pair in enumerate(pairs(cells))]
    found = answer(engine, "check", pairs=chosen, data={"patch_px": 64})
    assert [row["part"] for row in found["pairs"]] == ["held out", "train", "train"]


def test_the_same_image_twice_is_told(engine, cells):
    twice = [*pairs(cells), {**pairs(cells)[0], "image": pairs(cells)[0]["image"]}]
    found = answer(engine, "check", pairs=twice, data={"patch_px": 64})
    codes = [[problem["code"] for problem in row["problems"]] for row in found["pairs"]]
    assert codes == [[], [], [], ["same-image"]]


def test_sample_cells_are_drawn(engine, tmp_path):
    samples = answer(engine, "samples", output=str(tmp_path))["samples"]
    assert len(samples) == 3
    for sample in samples:
        assert np.load(sample["image"]).shape == np.load(sample["labels"]).shape == (256, 256)
        assert np.load(sample["labels"]).max() >= 4


def test_a_foreground_mask_is_found_and_mended(engine, cells, tmp_path):
    labels = tifffile.imread(cells / "labels" / "c0.tif")
    tifffile.imwrite(tmp_path / "c0.tif", (labels > 0).astype(np.uint8))
    pair = {"image": str(cells / "images" / "c0.tif"), "labels": str(tmp_path / "c0.tif"), "held_out": None}
    (row,) = answer(engine, "check", pairs=[pair], data={})["pairs"]
    assert [problem["code"] for problem in row["problems"]] == ["foreground-mask"]
    mended = answer(engine, "mend", code="foreground-mask", output=str(tmp_path / "out"), **pair)
    assert len(np.unique(np.load(mended["labels"]))) == 10
    assert len(np.unique(tifffile.imread(tmp_path / "c0.tif"))) == 2


def test_models_are_ranked_and_what_cannot_be_opened_is_said(engine, cells, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"half of a model")
    files = [(pair["image"], pair["labels"]) for pair in pairs(cells)]
    config = make_config({"data": {"patch_px": 64}, "training": {"input_px": 128}, "resources": {"device": "cpu"}})
    found = answer(
        engine,
        "suggest",
        images=[image for image, _ in files],
        labels=[labels for _, labels in files],
        candidates=[str(cells / "start.pt"), str(tmp_path / "broken.pt")],
        config=config.model_dump(mode="json"),
    )
    assert found["start_from"] == str(cells / "start.pt")
    assert [Path(each["model"]).name for each in found["left_out"]] == ["broken.pt"]
    assert "only model that was compared" in found["advice"]


def test_bad_requests_and_bad_files_are_said_in_words(engine, tmp_path):
    assert "knows no such request" in answer(engine, "dance")["problems"][0]
    missing = {"image": str(tmp_path / "no.tif"), "labels": str(tmp_path / "no.tif"), "held_out": None}
    (row,) = answer(engine, "check", pairs=[missing], data={})["pairs"]
    assert row["problems"][0]["level"] == "error"
    segmented = answer(
        engine, "segment", image=str(tmp_path / "no.tif"), model="vit_x", mode="ais", output=str(tmp_path)
    )
    assert "no.tif" in segmented["problems"][0]


@pytest.mark.timeout(1200)
def test_a_plan_that_does_not_fit_comes_with_one_that_does(engine):
    small = {"model": "random:vit_t", "training": {"input_px": 128, "objects": 2}, "data": {"patch_px": 64}}
    fits = answer(engine, "plan", config=small, held_out=1)
    assert fits["fits"] and fits["smaller"] is None
    assert 0 < fits["seconds_at_least"] <= fits["seconds_at_most"]
    # Little enough to be free beside other tests: what is not free is not planned with.
    large = {
        "model": "vit_b_lm",
        "data": {"patch_px": 256},
        "training": {"input_px": 512},
        "resources": {"memory_gb": 3.6, "levers": "off"},
    }
    tight = answer(engine, "plan", config=large, held_out=1)
    assert not tight["fits"]
    assert tight["smaller"]["peak_gb"] < 3.6 < tight["peak_gb"]


@pytest.mark.slow
def test_other_parameters_take_no_network(engine, cells, tmp_path):
    request = {"image": str(cells / "images" / "c0.tif"), "model": str(cells / "start.pt"), "output": str(tmp_path)}
    first = answer(engine, "segment", mode="ais", **request)
    again = answer(engine, "segment", mode="ais", parameters={"foreground_threshold": 0.1}, **request)
    labels = np.load(first["labels"])
    assert labels.shape == (96, 96) and labels.dtype == np.uint32
    assert again["seconds"] < first["seconds"] / 4


def test_errors_of_a_segmentation_are_classified(engine, tmp_path):
    truth, found = np.zeros((40, 40), np.uint16), np.zeros((40, 40), np.uint16)
    truth[2:10, 2:10], found[2:10, 2:10] = 1, 5  # right
    truth[20:28, 2:10] = 2  # missed
    found[30:38, 30:38] = 6  # extra
    truth[2:10, 20:26], truth[2:10, 28:34], found[2:10, 20:34] = 3, 4, 7  # merged
    truth[20:28, 20:32], found[20:28, 20:25], found[20:28, 27:32] = 5, 8, 9  # split
    for name, array in (("truth", truth), ("found", found)):
        np.save(tmp_path / f"{name}.npy", array)
    request = {"truth": str(tmp_path / "truth.npy"), "prediction": str(tmp_path / "found.npy")}
    answered = answer(engine, "compare", output=str(tmp_path), **request)
    assert answered["counts"] == {"right": 1, "extra": 1, "missed": 1, "merged": 1, "split": 1}
    errors = np.load(answered["errors"])
    assert [errors[y, x] for y, x in ((5, 5), (33, 33), (24, 5), (5, 22), (24, 22))] == [1, 2, 3, 4, 5]
    assert answered["row"]["sa50"] == pytest.approx(1 / 9)
    assert answered["curve"][0] == [0.5, pytest.approx(1 / 9)]


def test_of_many_requests_on_one_topic_the_newest_counts(engine, cells):
    got: list[int] = []
    for number in range(5):
        data = {"patch_px": 64, "min_object_px": 20 + number}
        engine.ask(
            "check", topic="t", on_result=lambda _, number=number: got.append(number), pairs=pairs(cells), data=data
        )
    until(lambda: got)
    until(lambda: not engine._asked)
    assert got == [4]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_engine_that_is_killed_is_noticed_and_started_again(qapp, cells, tmp_path):
    client = EngineClient(tmp_path)
    said, crashes = [], []
    client.crashed.connect(crashes.append)
    client.ask("computer", on_error=said.append)
    until(lambda: client.status == "ready")
    os.kill(client.pid, signal.SIGKILL)
    until(lambda: said)
    assert "killed (SIGKILL" in said[0][0] and "layers are as they were" in said[0][0]
    assert len(crashes) == 1 and client.status == "crashed"
    assert len(answer(client, "check", pairs=pairs(cells), data={"patch_px": 64})["pairs"]) == 3
    assert client.status == "ready"
    pid = client.pid
    client.close(wait_seconds=10)
    assert not psutil.pid_exists(pid)


def test_an_engine_ends_when_idle_and_that_is_no_crash(qapp, tmp_path):
    client = EngineClient(tmp_path, idle_seconds=0.4)
    crashes = []
    client.crashed.connect(crashes.append)
    client.start()
    until(lambda: client.status == "ready")
    until(lambda: client.status == "off")
    assert crashes == [] and client.pid is None
    client.close()


def test_an_engine_ends_with_its_window(qapp, tmp_path):
    client = EngineClient(tmp_path)
    client.start()
    until(lambda: client.status == "ready")
    process = psutil.Process(client.pid)
    # As when the window is killed: its end of the pipe is closed, and nothing else is said.
    client._process.stdin.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(10)
    assert not process.is_running()
    client.close()
