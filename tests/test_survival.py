"""A run that meets the end of its memory goes on with less, exactly where it was, or says why it cannot."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import tifffile
import torch

import napari_resfinetune as rf
from napari_resfinetune.config.cache import cache_folder
from napari_resfinetune.events import Event, Failed, MemoryLever, Started, Step
from napari_resfinetune.planning import probe_hardware
from napari_resfinetune.planning.calibration import FILE as CALIBRATION
from napari_resfinetune.training import loop
from napari_resfinetune.training.survival import go_back, remember
from small_runs import SMALL, TRAINING, run, weights

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")


def runs_out(monkeypatch, error: Exception, enough, at: str = "backward_samples", after: int = 0) -> None:
    """Let `at` do its work and then fail, as long as its settings are not `enough`, from the call number `after` on."""
    real, calls = getattr(loop, at), []

    def limited(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        result = real(*args, **kwargs)
        if len(calls) > after and not enough(args[3]):
            raise error
        return result

    monkeypatch.setattr(loop, at, limited)


def levers(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.lever, event.after) for event in events if isinstance(event, MemoryLever)]


@pytest.mark.parametrize(
    ("error", "update"),
    [
        pytest.param(CUDA, "together", id="card"),
        pytest.param(CPU, "alternating", id="between two updates"),
    ],
)
def test_levers_are_pulled_and_the_weights_are_those_of_a_run_that_had_them_from_the_start(
    cells, tmp_path, monkeypatch, error, update
):
    training = {"update": update, "epochs": 1}
    smaller = {
        "freed_memory": "return",
        "checkpoint_instance_decoder": True,
        "checkpoint_encoder": True,
        "object_chunk": 1,
    }
    run(cells, tmp_path / "calm", training=training, resources={**SMALL["resources"], **smaller})
    runs_out(monkeypatch, error, lambda settings: settings.object_chunk == 1)
    events: list[Event] = []
    result = run(cells, tmp_path / "tight", events, training=training)
    assert result.status == "finished"
    assert [lever.partition(".")[2] for lever, _ in levers(events)] == list(smaller)
    assert [after for _, after in levers(events)] == [str(value) for value in smaller.values()]
    assert sum(isinstance(event, Step) for event in events) == 2
    calm, tight = (weights(tmp_path / name / "checkpoints" / "latest") for name in ("calm", "tight"))
    for name, value in calm.items():
        assert torch.equal(value, tight[name]), name


def test_a_lever_pulled_later_stays_pulled_when_the_run_is_resumed(cells, tmp_path, monkeypatch):
    runs_out(monkeypatch, CPU, lambda settings: settings.checkpoint_instance_decoder, after=3)
    events: list[Event] = []
    run(cells, tmp_path / "run", events, training={"epochs": 2, "batch_size": 1})
    assert levers(events) == [("resources.freed_memory", "return"), ("resources.checkpoint_instance_decoder", "True")]
    at = next(i for i, event in enumerate(events) if isinstance(event, MemoryLever))
    assert sum(isinstance(event, Step) for event in events[:at]) == 3
    again: list[Event] = []
    rf.resume(tmp_path / "run", epochs=3, on_event=again.append)
    assert levers(again) == []
    assert any(isinstance(event, Step) for event in again)


def test_validation_survives_too(cells, tmp_path, monkeypatch):
    runs_out(monkeypatch, MemoryError(), lambda settings: settings.checkpoint_encoder, at="validate_sample")
    events: list[Event] = []
    assert run(cells, tmp_path / "run", events, training={"epochs": 1}).status == "finished"
    assert len(levers(events)) == 3


def test_the_optimizer_survives_half_made_moments(cells, tmp_path, monkeypatch):
    real, failed = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any) -> Any:
        if not failed:
            failed.append(True)
            first = self.param_groups[0]["params"][0]
            self.state[first]["step"] = torch.tensor(0.0)
            self.state[first]["exp_avg"] = torch.zeros_like(first)
            raise CPU
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert run(cells, tmp_path / "run", training={"epochs": 1}).status == "finished"


def test_a_step_that_ran_out_in_16_bit_is_not_scaled_twice_when_it_is_tried_again(monkeypatch):
    """A fused optimizer is given the scale as an attribute, which a step that fails leaves behind."""
    model = rf.load_model("random:vit_t", decoder="none")
    parameter = model.sam.mask_decoder.iou_token.weight
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, start = remember(model, scaler), parameter.detach().clone()

    def attempt(scaler: torch.amp.GradScaler) -> None:
        scaler.scale(1e-5 * parameter.sum()).backward()
        scaler.step(optimizer)

    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(CPU))
    optimizer.step = functools.partial(torch.optim.AdamW.step, optimizer)
    with pytest.raises(RuntimeError):
        attempt(scaler)
    monkeypatch.setattr(torch.optim.AdamW, "step", real)
    optimizer.step = functools.partial(real, optimizer)
    again = go_back(before, model, optimizer, scaler)
    assert again is not None and torch.equal(parameter, start)
    attempt(again)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 1e-6))


def test_fewer_objects_are_the_last_thing_and_are_said_to_change_training(cells, tmp_path, monkeypatch):
    seen: list[int] = []

    def counted(model, patches, plans, settings, **kwargs):
        seen.append(len(plans[0].masks))
        return real(model, patches, plans, settings, **kwargs)

    real = loop.backward_samples
    monkeypatch.setattr(loop, "backward_samples", counted)
    runs_out(monkeypatch, CPU, lambda settings: seen[-1] == 1)
    events: list[Event] = []
    assert run(cells, tmp_path / "run", events, training={"epochs": 1}).status == "finished"
    pulled = [event for event in events if isinstance(event, MemoryLever)]
    assert [event.changes_training for event in pulled] == [False] * (len(pulled) - 1) + [True]
    assert (pulled[-1].lever, pulled[-1].after) == ("training.objects", "1")


def test_when_nothing_is_left_the_run_is_saved_and_says_what_would_fit(cells, tmp_path, monkeypatch):
    with monkeypatch.context() as tight:
        runs_out(tight, CPU, lambda settings: False, after=2)
        events: list[Event] = []
        with pytest.raises(rf.ResourceError, match="nothing is left") as caught:
            run(cells, tmp_path / "run", events)
    assert caught.value.exit_status == 3
    assert len(caught.value.problems) > 1
    assert "resfinetune resume" in str(caught.value)
    assert isinstance(events[-1], Failed)
    assert events[-1].resumable
    again: list[Event] = []
    more = {"memory_gb": 5.5}  # which is free beside other tests
    assert rf.resume(tmp_path / "run", resources=more, on_event=again.append).status == "finished"
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text(encoding="utf-8"))
    assert state["levers"] == {}
    assert next(event for event in again if isinstance(event, Started)).memory_limit_gb == 5.5
    steps = [line for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if '"Step"' in line]
    assert len(steps) == TRAINING["epochs"] * TRAINING["samples_per_epoch"] // TRAINING["batch_size"]


def test_levers_stay_where_they_are_on_request(cells, tmp_path, monkeypatch):
    runs_out(monkeypatch, CPU, lambda settings: False)
    with pytest.raises(rf.ResourceError, match=r"resources\.levers is off"):
        run(cells, tmp_path / "run", resources={**SMALL["resources"], "levers": "off"})


def test_a_run_that_cannot_fit_is_refused_before_it_starts(cells, tmp_path):
    with pytest.raises(rf.ResourceError, match="would take") as caught:
        run(cells, tmp_path / "run", resources={**SMALL["resources"], "memory_gb": 0.3})
    assert "are allowed (resources.memory_gb)" in str(caught.value)
    assert not (tmp_path / "run").exists()


def in_child(cells: Path, output: Path, on_event: Any, **changes: Any) -> rf.TrainResult:
    settings = {**SMALL, "training": {**TRAINING, **changes.pop("training", {})}, **changes}
    places = (cells / "images", cells / "labels")
    return rf.train(*places, model=cells / "start.pt", output=output, on_event=on_event, isolate=True, **settings)


@pytest.fixture
def hopeful_plan(tmp_path, monkeypatch):
    """Let the planner believe that everything fits, so that all is left to the trainer."""
    monkeypatch.setenv("RESFINETUNE_CACHEDIR", str(tmp_path))
    key = f"memory, {probe_hardware().cpu}, keep"
    (cache_folder() / CALIBRATION).write_text(json.dumps({key: {"factor": 0.1}}))


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a limit on a process")


@only_linux
def test_under_a_real_limit_the_child_pulls_levers_and_stays_inside(cells, tmp_path, hopeful_plan):
    work = {
        "data": {"patch_px": 256},
        "training": {"epochs": 1, "input_px": 512, "objects": 9, "batch_size": 1, "samples_per_epoch": 2},
    }
    events: list[Event] = []
    resources = {**SMALL["resources"], "memory_gb": 3.1}
    result = in_child(cells, tmp_path / "run", events.append, resources=resources, **work)
    assert result.status == "finished"
    assert levers(events)
    assert result.peak_memory_gb <= 3.1 * 1.1  # what a heap gave back it may fill again


@only_linux
def test_under_a_hopeless_limit_the_child_says_what_would_fit_and_leaves_a_checkpoint(cells, tmp_path, hopeful_plan):
    work = {"data": {"patch_px": 512}, "training": {"epochs": 1, "input_px": 1024, "batch_size": 1}}
    resources = {**SMALL["resources"], "memory_gb": 1.6}
    with pytest.raises(rf.ResourceError, match="nothing is left") as caught:
        in_child(cells, tmp_path / "run", None, resources=resources, **work)
    assert caught.value.exit_status == 3
    assert len(caught.value.problems) > 1
    assert (tmp_path / "run" / "checkpoints" / "latest" / "state.json").is_file()


def test_a_killed_child_is_reported_and_resumed_to_the_same_weights(cells, tmp_path):
    def kill(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.epoch == 1:
            psutil.Process().children()[-1].kill()

    events: list[Event] = []
    with pytest.raises(rf.TrainingError, match="killed") as caught:
        in_child(cells, tmp_path / "run", kill)
    assert "resfinetune resume" in str(caught.value)
    assert isinstance(events[-1], Failed)
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["event"] == "Failed"
    assert rf.resume(tmp_path / "run").status == "finished"
    run(cells, tmp_path / "calm")
    resumed, calm = (weights(tmp_path / name / "checkpoints" / "latest") for name in ("run", "calm"))
    for name, value in calm.items():
        assert torch.equal(value, resumed[name]), name


def test_a_child_trains_on_arrays_and_stops_when_asked(cells, tmp_path):
    images, labels = ([tifffile.imread(f) for f in sorted((cells / n).glob("*.tif"))] for n in ("images", "labels"))
    stop = rf.StopToken()

    def after_a_step(event: Event) -> None:
        if isinstance(event, Step):
            stop.stop()

    settings = {**SMALL, "training": {**TRAINING, "samples_per_epoch": 40}}
    settings["resources"] = {**SMALL["resources"], "workers": 1}
    named = {"model": cells / "start.pt", "output": tmp_path / "run", "on_event": after_a_step, "stop": stop}
    assert rf.train(images, labels, isolate=True, **named, **settings).status == "stopped"
    assert (tmp_path / "run" / "checkpoints" / "latest").is_dir()
