"""What only a CUDA card can show; skipped where there is none."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

import napari_resfinetune as rf
from napari_resfinetune.config.cache import cache_folder
from napari_resfinetune.data.synthetic import make_sample
from napari_resfinetune.events import Event, MemoryLever, Step
from napari_resfinetune.planning import probe_hardware
from napari_resfinetune.planning.calibration import FILE as CALIBRATION
from napari_resfinetune.training.step import StepSettings, backward_samples
from small_runs import SMALL, TRAINING, run, weights
from test_step import (
    INPUT_PX,
    doubled,  # noqa: F401 - a fixture
    gradients,
    plan,
    sample,
    small_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CARD = {"device": "cuda", "precision": "fp32"}


@pytest.mark.parametrize("architecture", ["vit_t", "vit_b"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.usefixtures("doubled")
def test_a_card_gives_the_losses_and_gradients_of_a_cpu(architecture, step):
    model, _ = small_model(architecture, torch.float64)
    patch = sample(dtype=torch.float64)
    prompts, settings = plan(patch, step), StepSettings(input_px=INPUT_PX)
    (expected,) = backward_samples(model, [patch], [prompts], settings, train_instances=True)
    expected_gradients = {name: value.clone() for name, value in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    model.to("cuda")
    (found,) = backward_samples(model, [patch], [prompts], settings, train_instances=True)
    assert found.total == pytest.approx(expected.total, rel=1e-5)
    for name, value in expected_gradients.items():
        difference = (gradients(model)[name].cpu() - value).norm() / (value.norm() + 1e-9)
        assert difference < 1e-4, name


STRATEGIES = {
    "full": {"kind": "full"},
    "frozen": {"kind": "frozen"},
    "late": {"kind": "late", "blocks": 2},
    "lora": {"kind": "lora"},
    "late_lora": {"kind": "late_lora", "blocks": 2},
    "qlora": {"kind": "lora", "quantize": True},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_on_a_card_and_the_model_opens_on_a_cpu(cells, tmp_path, strategy):
    if strategy == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    events: list[Event] = []
    result = run(cells, tmp_path / "run", events, strategy=STRATEGIES[strategy], resources=CARD)
    assert result.status == "finished"
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 6
    assert all(np.isfinite(event.loss) for event in steps)
    assert steps[0].peak_memory_gb > 0
    image = make_sample("fluorescence_nuclei", seed=0, shape=(96, 96)).image
    for device in ("cuda", "cpu"):
        labels = rf.segment(image, model=tmp_path / "run" / "model.pt", device=device)
        assert labels.shape == image.shape


def test_a_run_of_a_card_goes_on_on_a_cpu(cells, tmp_path):
    stop = rf.StopToken()

    def after_one_epoch(event: Event) -> None:
        if isinstance(event, Step) and (event.epoch, event.step) == (0, 1):
            stop.stop()

    settings = {**SMALL, "resources": CARD, "training": {**TRAINING, "epochs": 2}}
    stopped = rf.train(
        cells / "images",
        cells / "labels",
        model=cells / "start.pt",
        output=tmp_path / "run",
        on_event=after_one_epoch,
        stop=stop,
        **settings,
    )
    assert stopped.status == "stopped"
    assert rf.resume(tmp_path / "run").status == "finished"


def test_a_card_that_runs_out_of_memory_makes_levers_be_pulled_and_changes_no_weight(cells, tmp_path, monkeypatch):
    """The limit is real: torch refuses memory beyond it. The planner is made to believe that everything fits."""
    work = {
        "data": {"patch_px": 256},
        "training": {"epochs": 1, "input_px": 512, "objects": 9, "batch_size": 1, "samples_per_epoch": 2},
    }
    calm: list[Event] = []
    run(cells, tmp_path / "calm", calm, resources=CARD, **work)
    needed_gb = max(event.peak_memory_gb for event in calm if isinstance(event, Step))
    monkeypatch.setenv("RESFINETUNE_CACHEDIR", str(tmp_path))
    card = probe_hardware().gpus[0].name
    (cache_folder() / CALIBRATION).write_text(json.dumps({f"memory, {card}, keep": {"factor": 0.1}}))
    events: list[Event] = []
    result = run(cells, tmp_path / "tight", events, resources={**CARD, "gpu_memory_gb": 0.8 * needed_gb}, **work)
    assert result.status == "finished"
    assert [event for event in events if isinstance(event, MemoryLever)]
    assert max(event.peak_memory_gb for event in events if isinstance(event, Step)) <= 0.8 * needed_gb
    expected, found = (weights(tmp_path / name / "checkpoints" / "latest") for name in ("calm", "tight"))
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_compiled_parts_give_the_same_losses_on_a_card():
    model, _ = small_model("vit_b")
    model.to("cuda")
    patch = sample()
    losses = []
    for compile in (False, True):
        model.zero_grad()
        settings = StepSettings(input_px=INPUT_PX, compile=compile)
        losses += backward_samples(model, [patch], [plan(patch, 1)], settings, train_instances=True)
    assert losses[1].total == pytest.approx(losses[0].total, rel=1e-3)
