"""The plan: which levers it pulls, what it predicts, and that it comes from the step's own code."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import napari_resfinetune as rf
from napari_resfinetune.config import FrozenStrategy, FullStrategy, LateStrategy, make_config
from napari_resfinetune.config.cache import cache_folder
from napari_resfinetune.planning import (
    Gpu,
    Hardware,
    Length,
    Rates,
    StepCost,
    Work,
    asked_device,
    choose_limits,
    get_preset,
    learn_from_run,
    levered,
    make_plan,
    pull_lever,
    rates_here,
    what_else,
    what_larger,
)
from napari_resfinetune.planning.calibration import FILE as CALIBRATION
from napari_resfinetune.training import dry_run, kept_costs, losses
from napari_resfinetune.training.dry_run import step_cost
from napari_resfinetune.training.kept_costs import PartCost
from napari_resfinetune.training.planned import plan_anywhere
from napari_resfinetune.training.prepare import choose_setup

LENGTH = Length(epochs=2, steps_per_epoch=50, validation_samples=5, patches_kept=55)
SMALL = Work("vit_t", patch_px=64, input_px=128, objects=4)


def rates(_: Work) -> Rates:
    return Rates(tflops=0.4)


def made_up_cost(work: Work) -> StepCost:
    """Costs that fall with every lever, as real ones do."""
    encoder = 2.0 if not work.checkpoint_encoder else 0.5
    instance = 2.0 if not work.checkpoint_instance_decoder else 1.0
    masks = 0.1 * min(work.object_chunk or work.objects, work.objects)
    parts = {"image encoder": encoder, "instance decoder": encoder + instance, "mask decoder": encoder + masks}
    return StepCost(0.4, 0.8, parts, dict.fromkeys(parts, 1.0))


def test_levers_are_pulled_cheapest_first_until_it_fits():
    work = Work("vit_b", precision="bf16", objects=8)
    free = make_plan(work, 100, LENGTH, made_up_cost, rates)
    assert free.fits
    assert free.levers == ()
    keys = []
    for limit_gb in (7.8, 6.2, 4.9):
        plan = make_plan(work, limit_gb, LENGTH, made_up_cost, rates)
        assert plan.fits
        assert plan.peak_gb <= limit_gb
        keys.append([pulled.lever for pulled in plan.levers])
    assert keys[0] == ["resources.checkpoint_instance_decoder"]
    assert keys[1] == [*keys[0], "resources.checkpoint_encoder"]
    assert keys[2][:3] == [*keys[1], "resources.freed_memory"]


def test_a_plan_never_changes_training_and_says_when_nothing_fits():
    plan = make_plan(Work("vit_b", objects=8), 1.0, LENGTH, made_up_cost, rates)
    assert not plan.fits
    assert not any(pulled.changes_training for pulled in plan.levers)
    assert plan.work.objects == 8
    assert plan.work.object_chunk == 1


def test_levers_are_left_alone_on_request():
    plan = make_plan(Work("vit_b"), 1.0, LENGTH, made_up_cost, rates, pull_levers=False)
    assert (plan.levers, plan.fits) == ((), False)


@given(
    st.sampled_from(["both", "masks", "instances"]),
    st.sampled_from([FullStrategy(), FrozenStrategy(), LateStrategy(blocks=1)]),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(0, 4),
)
def test_the_row_of_levers_ends_and_ends_in_the_smallest_work(targets, strategy, objects, micro_batch, workers):
    work = Work("vit_t", strategy=strategy, targets=targets, objects=objects, micro_batch=micro_batch, workers=workers)
    pulled = []
    while (following := pull_lever(work, ran_out=True)) is not None:
        smaller, lever = following
        assert smaller != work
        assert not (pulled and pulled[-1].changes_training and not lever.changes_training)
        work = smaller
        pulled.append(lever)
    assert len(pulled) < 30
    assert (work.micro_batch, work.workers) == (1, 0)
    assert work.checkpoint_encoder == (strategy.kind != "frozen")
    assert work.checkpoint_instance_decoder == (targets != "masks")
    assert (work.objects == 1) == (targets != "instances" or objects == 1)


def test_what_is_pulled_goes_into_the_configuration():
    config = make_config({"training": {"objects": 8}, "output": "run"})
    plan = make_plan(Work("vit_b", objects=8), 4.9, LENGTH, made_up_cost, rates)
    resources = levered(config, plan.levers).resources
    assert resources.checkpoint_encoder
    assert resources.checkpoint_instance_decoder
    assert resources.freed_memory == "return"
    assert levered(config, ()) == config


def test_what_else_would_fit_is_said():
    def cost(work: Work) -> StepCost:
        size = {"vit_t": 1, "vit_b": 4, "vit_l": 9, "vit_h": 16}[work.architecture]
        return StepCost(
            size, 0.0 if work.strategy.kind == "frozen" else 2 * size, {"image encoder": 0.0}, {"image encoder": size}
        )

    said = what_else(Work("vit_b"), 10.0, LENGTH, cost, rates)
    assert [text.split(" would")[0] for text in said] == ["--strategy frozen", "an architecture vit_t model"]
    assert "does not fit in 10.0 GB" in what_larger(Work("vit_t"), 10.0, LENGTH, cost, rates)[0]
    assert "nothing smaller fits" in what_else(Work("vit_t"), 1.0, LENGTH, cost, rates)[0]


def test_one_head_stands_for_all_of_them_in_a_dry_run(monkeypatch):
    work = Work("vit_b", patch_px=256, input_px=512, targets="instances")
    quick = step_cost(work)
    monkeypatch.setattr(dry_run._Count, "first_for_all", lambda self, number: range(number))
    monkeypatch.setattr(dry_run, "_encoder_cost", inspect.unwrap(dry_run._encoder_cost))
    whole = step_cost(work)
    assert quick.tflop == pytest.approx(whole.tflop)
    assert quick.activations_gb == pytest.approx(whole.activations_gb, rel=0.01)


def test_a_dry_run_sees_what_strategy_levers_and_objects_do():
    full = step_cost(SMALL)
    frozen = step_cost(replace(SMALL, strategy=FrozenStrategy(), keep_features=True))
    assert frozen.optimizer_gb < full.optimizer_gb
    assert frozen.tflop["image encoder"] == 0 < frozen.frozen_tflop
    assert frozen.features_gb == pytest.approx(256 * 8 * 8 * 2 / 1e9)
    assert full.frozen_tflop == full.features_gb == 0
    larger = replace(SMALL, patch_px=256, input_px=512)
    kept = step_cost(larger)
    checkpointed = step_cost(replace(larger, checkpoint_encoder=True, checkpoint_instance_decoder=True))
    for part in ("image encoder", "instance decoder"):
        assert checkpointed.activations_gb[part] < kept.activations_gb[part]
        assert checkpointed.tflop[part] > kept.tflop[part]
    many, few = (step_cost(replace(SMALL, objects=count)) for count in (16, 4))
    assert many.activations_gb["mask decoder"] > few.activations_gb["mask decoder"]
    chunked = step_cost(replace(SMALL, objects=16, object_chunk=4))
    assert chunked.activations_gb == few.activations_gb
    assert chunked.tflop["mask decoder"] == pytest.approx(4 * few.tflop["mask decoder"])
    assert step_cost(replace(SMALL, targets="masks")).tflop["instance decoder"] == 0
    assert step_cost(replace(SMALL, precision="bf16")).tensors_gb < full.tensors_gb


def test_a_dry_run_leaves_nothing_behind_that_a_real_step_would_meet():
    losses._interpolation.cache_clear()
    inspect.unwrap(dry_run._mask_cost)(SMALL)
    assert losses._interpolation.cache_info().currsize == 0
    assert type(losses._interpolation(4, 16, 16, 8, torch.device("cpu"), torch.float32)) is torch.Tensor


def test_plan_from_python_needs_neither_a_download_nor_data():
    plan = rf.plan(model="vit_b_lm", preset="gtx1080")
    assert plan.fits
    assert plan.work.architecture == "vit_b"
    said = plan.to_dict()
    assert {"peak_gb", "seconds_per_epoch", "fits", "levers"} <= set(said)
    assert json.loads(json.dumps(said)) == said


def test_a_preset_is_planned_under_its_own_limit_whatever_is_free_here():
    small = {"training": {"input_px": 128}, "data": {"patch_px": 64}}
    for preset in ("cpu-8gb", "cpu-64gb"):
        plan = rf.plan(model="random:vit_t", preset=preset, resources={"device": "cpu", "precision": "fp32"}, **small)
        assert plan.limit_gb == get_preset(preset).memory_gb
        assert plan.fits
        assert "vit_b would take" in plan.advice[0]
    resources = {"preset": "cpu-8gb", "memory_gb": 0.9, "device": "cpu", "precision": "fp32"}
    assert rf.plan(model="random:vit_t", resources=resources, **small).fits is False


def test_limits_come_from_what_was_asked_the_preset_and_what_is_free(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    hardware = Hardware("a CPU", 4, 8, 64.0, 30.0)
    ask = make_config({}).resources
    preset = get_preset("cpu-8gb")
    limits = choose_limits(ask, preset, hardware, "cpu")
    assert (limits.memory_gb, limits.threads, limits.reason) == (8, 4, "preset cpu-8gb")
    limits = choose_limits(ask.model_copy(update={"memory_gb": 12.0, "threads": 3}), preset, hardware, "cpu")
    assert (limits.memory_gb, limits.threads, limits.reason) == (12, 3, "resources.memory_gb")
    limits = choose_limits(ask, get_preset("cpu-64gb"), hardware, "cpu")
    assert limits.memory_gb == 30
    assert "30.0 GB RAM are free" in limits.reason


@pytest.fixture
def own_calibration(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RESFINETUNE_CACHEDIR", str(tmp_path))
    return cache_folder() / CALIBRATION


def test_threads_that_the_environment_gives_are_a_limit_unless_asked_otherwise(monkeypatch):
    hardware, preset = Hardware("a CPU", 8, 16, 64.0, 50.0), get_preset("cpu-16gb")
    ask = make_config({"resources": {"preset": "cpu-16gb", "device": "cpu", "precision": "fp32"}})
    for said, expected in (("3", 3), ("4,2", 4), ("40", 8), ("0", 8), ("many", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert choose_limits(ask.resources, preset, hardware, "cpu").threads == expected
        noted = any("OMP_NUM_THREADS" in note for note in choose_setup(ask, hardware).notes)
        assert noted == (expected < 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    asked = make_config({"resources": {**ask.resources.model_dump(), "threads": 6}})
    setup = choose_setup(asked, hardware)
    assert setup.limits.threads == 6 and not any("OMP_NUM_THREADS" in note for note in setup.notes)


def test_runs_correct_the_next_prediction(own_calibration):
    hardware = Hardware("a CPU", 2, 2, 16.0, 12.0)
    before = rates_here(SMALL, hardware, "cpu", 2)
    assert (before.memory_factor, before.seconds_factor, before.measured) == (1.0, 1.0, False)
    figures = {"predicted_gb": 5.0, "measured_gb": 5.8, "predicted_seconds": 10.0, "measured_seconds": 14.0}
    learn_from_run(SMALL, hardware, "cpu", 2, before, **figures)
    after = rates_here(SMALL, hardware, "cpu", 2)
    assert after.measured
    assert after.memory_factor == pytest.approx(1.1)  # half of the way to 4.8 over 4.0
    assert after.seconds_factor == pytest.approx(1.2)
    other = Hardware("another CPU", 2, 2, 16.0, 12.0)
    assert not rates_here(SMALL, other, "cpu", 2).measured
    predicted = [make_plan(SMALL, 100, LENGTH, made_up_cost, lambda _, now=now: now).peak_gb for now in (before, after)]
    assert predicted[1] > predicted[0]


def test_runs_that_were_planned_together_correct_the_prediction_once(own_calibration):
    hardware = Hardware("a CPU", 2, 2, 16.0, 12.0)
    planned = rates_here(SMALL, hardware, "cpu", 2)
    for _ in range(8):  # as of a sweep, whose runs are planned before the first of them has ended
        learn_from_run(
            SMALL, hardware, "cpu", 2, planned,
            predicted_gb=5.0, measured_gb=5.4, predicted_seconds=10.0, measured_seconds=12.0,
        )  # fmt: skip
    after = rates_here(SMALL, hardware, "cpu", 2)
    assert after.memory_factor == pytest.approx(1.1, abs=0.01)
    assert after.seconds_factor == pytest.approx(1.2, abs=0.01)


def test_a_preset_for_cpus_means_the_cpu():
    card = Gpu(0, "a card", 24.0, 23.0, (8, 6), True)
    hardware = Hardware("a CPU", 8, 8, 64.0, 60.0, (card,))
    asked = make_config({"model": "vit_t", "resources": {"preset": "cpu-8gb"}})
    setup = choose_setup(asked, hardware)
    assert (setup.device, setup.limits.memory_gb) == ("cpu", 8)
    plan = plan_anywhere(asked, hardware, "vit_t", LENGTH)
    assert (plan.work.device, plan.limit_gb) == ("cpu", 8)
    assert not any("no such device" in text for text in plan.advice)
    on_card = make_config({"model": "vit_t", "resources": {"preset": "cpu-8gb", "device": "cuda"}})
    assert asked_device(on_card.resources) == "cuda"


def test_without_levers_the_advice_is_given_without_them_too():
    def cost(work: Work) -> StepCost:
        gb = (3.0 if work.checkpoint_encoder else 6.0) * (work.input_px / 1024) ** 2
        return StepCost(0.1, 0.1, {"image encoder": gb}, {"image encoder": 1.0})

    said = what_else(Work("vit_t"), 5.5, LENGTH, cost, rates, pull_levers=False)
    assert said[0].startswith("resources.levers=auto would take")
    planned = {text.partition(" would")[0]: text for text in said[1:]}
    for text in planned.values():
        gb = float(text.partition("take ")[2].partition(" GB")[0])
        assert gb <= 5.5
    half = next(text for text in said if "patch_px=256" in text)
    plain = make_plan(replace(Work("vit_t"), patch_px=256, input_px=512), 5.5, LENGTH, cost, rates, pull_levers=False)
    assert f"{plain.peak_gb:.1f} GB" in half


@pytest.mark.parametrize("content", ["", "no json", "[1]", '{"speed, a CPU, fp32, 2 threads": {"factor": "x"}}'])
def test_a_damaged_calibration_is_as_good_as_none(own_calibration, content):
    own_calibration.write_text(content)
    assert not rates_here(SMALL, Hardware("a CPU", 2, 2, 16.0, 12.0), "cpu", 2).measured


def test_a_dry_run_happens_once_for_all_processes(own_calibration, monkeypatch):
    def as_another_process() -> PartCost:
        dry_run._mask_cost.cache_clear()
        return dry_run._mask_cost(SMALL)

    found = as_another_process()
    calls: list[str] = []
    real = dry_run._fake_model
    monkeypatch.setattr(dry_run, "_fake_model", lambda *what: (calls.append("dry run"), real(*what))[1])
    assert as_another_process() == found and not calls
    file = cache_folder() / kept_costs.FILE
    content = json.loads(file.read_text())
    for damaged in (
        "no json",
        "[1]",
        json.dumps({**content, "figures": [1]}),
        json.dumps({**content, "figures": {key: {"tflop": "x"} for key in content["figures"]}}),
        json.dumps({**content, "figures": {key: {"what": 1.0} for key in content["figures"]}}),
        json.dumps({**content, "code": "of yesterday"}),
        json.dumps({**content, "figures": {key: {} for key in content["figures"]}}),
        json.dumps({**content, "figures": {k: {**v, "tflop": -1.0} for k, v in content["figures"].items()}}),
    ):
        file.write_text(damaged)
        calls.clear()
        assert as_another_process() == found and calls, damaged
        assert json.loads(file.read_text()) == content
