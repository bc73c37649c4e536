"""Before against after: windows, verdicts in words, and what a run does with them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import napari_resfinetune as rf
from napari_resfinetune.data.patches import Window
from napari_resfinetune.data.split import Region
from napari_resfinetune.evaluation import compare
from napari_resfinetune.evaluation.compare import LEAST_OBJECTS, NO_DECODER, RANDOM, Result, choose_windows, judge
from napari_resfinetune.evaluation.scores import score_objects
from napari_resfinetune.events import Compared, Event, Finished, Message, StopToken
from napari_resfinetune.models import load_model, save_model
from napari_resfinetune.reporting import ending
from small_runs import SMALL, TRAINING

SHORT = {"epochs": 1, "samples_per_epoch": 2, "targets": "instances", "compare": True, "report": True}


def squares(count: int, first: int = 0) -> np.ndarray:
    labels = np.zeros((160, 160), np.uint32)
    for number, place in enumerate(range(first, first + count), 1):
        y, x = 20 * (place // 8), 20 * (place % 8)
        labels[y : y + 14, x : x + 14] = number
    return labels


def results(found: np.ndarray, truth: np.ndarray, images: int) -> list[Result]:
    return [Result(found, *score_objects(truth, found))] * images


def verdict(before: np.ndarray, after: np.ndarray, truth: np.ndarray, images: int = 2, **how) -> dict:
    names = [f"image {number}" for number in range(images)]
    return judge(names, results(before, truth, images), results(after, truth, images), mode="ais", **how)


def test_verdicts_in_words():
    truth, worse = squares(40), squares(10)
    found = verdict(worse, truth, truth)
    assert found["verdict"] == "better"
    assert found["sentence"].startswith("Better than the start model: mSA 0.25 before, 1.00 after, SA50 0.25 before")
    assert "on 2 held-out images with 80 objects" in found["sentence"]
    assert found["images"] == [{"name": f"image {i}", "before": 0.25, "after": 1.0} for i in range(2)]
    low, high = found["interval"]
    assert 0.5 < low < 0.75 < high < 1
    assert "Keep the start model" in verdict(truth, worse, truth)["sentence"]
    assert verdict(truth, worse, truth)["verdict"] == "worse"
    same = verdict(squares(20), squares(20, 20), truth)
    assert same["verdict"] == "no clear difference"
    assert same["sentence"].startswith("No clear difference from the start model")


def test_few_images_and_few_objects_are_said():
    truth = squares(40)
    assert "One image does not tell" in verdict(squares(10), truth, truth, images=1)["sentence"]
    assert "held-out part of the only image" in verdict(truth, truth, truth, 1, single_image=True)["sentence"]
    few = squares(LEAST_OBJECTS - 1)
    found = verdict(0 * few, few, few, images=1, reason=RANDOM)
    assert found["verdict"] == "no clear difference"
    assert f"Fewer than {LEAST_OBJECTS} objects" in found["sentence"]
    assert RANDOM in found["sentence"]
    enough = squares(LEAST_OBJECTS)
    assert verdict(0 * enough, enough, enough, images=1)["verdict"] == "better"


@st.composite
def tiled(draw) -> tuple[list[Window], int]:
    """Draw windows of up to four images, as validation has them, and a side in pixels."""
    windows = []
    for pair in range(draw(st.integers(1, 4))):
        height, width = draw(st.integers(30, 400)), draw(st.integers(30, 400))
        region = Region(pair, None, (0, height), (0, width))
        for y in range(0, max(1, height - 63), 64):
            windows += [
                Window(region, (y, min(y + 64, height)), (x, min(x + 64, width)))
                for x in range(0, max(1, width - 63), 64)
            ]
    return windows, draw(st.sampled_from([64, 128, 512]))


@settings(max_examples=60, deadline=None)
@given(tiled())
def test_windows_lie_in_their_region_and_over_no_other_and_every_image_has_its_turn(drawn):
    windows, side = drawn
    chosen = choose_windows(windows, side, most=5)
    assert 1 <= len(chosen) <= 5
    assert {window.region.pair for window in chosen} == {window.region.pair for window in windows}
    seen = {window.region.pair: np.zeros((window.region.y[1], window.region.x[1]), int) for window in windows}
    for window in chosen:
        for (start, stop), (first, last) in ((window.y, window.region.y), (window.x, window.region.x)):
            assert first <= start < stop <= last
            assert stop - start == min(side, last - first)
        seen[window.region.pair][slice(*window.y), slice(*window.x)] += 1
    assert max(counts.max() for counts in seen.values()) == 1
    if side == 64 and len(windows) <= 5:
        assert set(chosen) == set(windows)


def test_a_run_in_a_process_of_its_own_is_compared_and_reported(cells, tmp_path):
    events: list[Event] = []
    result = rf.train(
        cells / "images",
        cells / "labels",
        model=cells / "start.pt",
        output=tmp_path / "run",
        on_event=events.append,
        isolate=True,
        **{**SMALL, "training": {**TRAINING, **SHORT}},
    )
    compared, finished = events[-2:]
    assert isinstance(compared, Compared)
    assert isinstance(finished, Finished)
    assert result.comparison == {name: value for name, value in compared.to_dict().items() if name != "event"}
    written = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in result.comparison} == result.comparison
    assert (compared.mode, len(compared.images)) == ("ais", 1)
    assert written["objects"] == 9
    for name in ("before", "after"):
        assert set(getattr(compared, name)) == {"sa50", "sa75", "msa"}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert compared.sentence in page
    assert "finished.</p>" in page
    assert page.count("data:image/png") == 3


@pytest.mark.parametrize("start", ["random", "without decoder"])
def test_a_start_model_that_cannot_segment_counts_as_finding_nothing(cells, tmp_path, start, monkeypatch):
    model = "random:vit_t"
    if start != "random":
        model = str(tmp_path / "start.pt")
        save_model(tmp_path / "start.pt", load_model("random:vit_t", decoder="none", seed=3))
    settings = {**SMALL, "training": {**TRAINING, **SHORT, "report": False}}
    output = tmp_path / "run"
    result = rf.train(cells / "images", cells / "labels", model=model, output=output, **settings)
    assert result.comparison["before"] == {"sa50": 0, "sa75": 0, "msa": 0}
    assert (RANDOM if start == "random" else NO_DECODER) in result.comparison["sentence"]
    # What was compared is not compared again, and is told again.
    monkeypatch.setattr(compare, "_segment_all", lambda *_, **__: pytest.fail("compared again"))
    events: list[Event] = []
    again = rf.resume(output, on_event=events.append)
    assert again.comparison == result.comparison
    assert any(isinstance(event, Compared) for event in events)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out"),
        (rf.ModelError("start.pt: does not exist"), "start.pt: does not exist"),
        (compare.Stopped(), "a stop was asked for"),
    ],
)
def test_what_cannot_be_compared_is_said_and_harms_nothing(cells, tmp_path, monkeypatch, error, words):
    def fails(*_):
        raise error

    told: list[Event] = []
    monkeypatch.setattr(ending, "compare_run", fails)
    monkeypatch.setattr(ending, "report_of_run", fails if isinstance(error, MemoryError) else lambda *_: None)
    job = FakeJob(tmp_path)
    finished = Finished("finished", 0, 0.5, 1.0, 1.0)
    assert ending.end_run(job, finished, StopToken(), told.append) is None
    texts = [event.text for event in told if isinstance(event, Message)]
    assert words in texts[1]
    assert "resfinetune resume" in texts[1]
    assert len(texts) == 2 + isinstance(error, MemoryError)
    told.clear()
    assert ending.end_run(job, replace(finished, status="stopped"), StopToken(), told.append) is None
    assert told == []


class FakeJob:
    """What `end_run` looks at of a job."""

    def __init__(self, path):
        from napari_resfinetune.config import make_config
        from napari_resfinetune.training.run_folder import RunFolder

        self.config, self.run = make_config({}), RunFolder(path)


def test_a_stop_between_windows_ends_a_comparison(cells, tmp_path):
    stop = StopToken()

    def after_training(event: Event) -> None:
        events.append(event)
        if type(event).__name__ == "EpochEnded":
            stop.stop()

    events: list[Event] = []
    settings = {**SMALL, "training": {**TRAINING, **SHORT}}
    result = rf.train(
        cells / "images",
        cells / "labels",
        model=cells / "start.pt",
        output=tmp_path / "run",
        on_event=after_training,
        stop=stop,
        **settings,
    )
    assert (result.status, result.comparison) == ("finished", None)
    assert any("not compared" in event.text for event in events if isinstance(event, Message))
    assert not (tmp_path / "run" / "comparison.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
