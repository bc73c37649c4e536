"""Training from end to end through the API, on small real networks: files, events, stop, resume."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import napari_resfinetune as rf
from napari_resfinetune.config import read_config
from napari_resfinetune.events import (
    Checkpointed,
    EpochEnded,
    Event,
    Finished,
    Message,
    Started,
    Step,
    event_from_dict,
)
from napari_resfinetune.models import load_model
from napari_resfinetune.training.run_folder import RunFolder, training_alone
from small_runs import SMALL, TRAINING, run, weights


def test_a_run_leaves_what_the_contract_says(cells, tmp_path):
    events: list[Event] = []
    result = run(cells, tmp_path / "run", events, training={"keep_every": 2})
    out = tmp_path / "run"
    assert (result.run_dir, result.status) == (out, "finished")
    for name in (
        "config.yaml",
        "environment.json",
        "plan.json",
        "split.json",
        "events.jsonl",
        "metrics.csv",
        "model.pt",
    ):
        assert (out / name).is_file(), name
    for name in ("latest", "best", "epoch-0002"):
        assert (out / "checkpoints" / name / "model.safetensors").is_file(), name
    kinds = [type(event) for event in events]
    assert kinds.count(Step) == 6
    assert kinds.count(EpochEnded) == 3
    assert kinds.count(Started) == kinds.count(Finished) == 1
    assert Message in kinds
    assert Checkpointed in kinds
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event_from_dict(line) for line in lines] == events
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert min(float(row["metric"]) for row in rows) == pytest.approx(result.best_metric)
    assert result.best_epoch == np.argmin([float(row["metric"]) for row in rows])
    config = read_config(out / "config.yaml")
    assert config.training.objects == 3
    split = json.loads((out / "split.json").read_text(encoding="utf-8"))
    named = [{entry["image"] for entry in split[part]} for part in ("train", "validation")]
    assert named[0].isdisjoint(named[1])
    assert named[0] | named[1] == {"c0", "c1", "c2"}
    best = load_model(out)
    assert best.instance_decoder is not None
    for name, value in weights(out / "checkpoints" / "best").items():
        part, key = name.split(".", 1)
        module = best.sam if part == "model" else best.instance_decoder
        assert torch.equal(module.state_dict()[key], value), name


def test_it_learns(cells, tmp_path):
    events: list[Event] = []
    training = {"targets": "instances", "batch_norm": "measure", "epochs": 3, "samples_per_epoch": 12, "patch_bank": 2}
    run(cells, tmp_path / "run", events, training=training)
    losses = [event.instance_loss for event in events if isinstance(event, Step)]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])


class StopAfter:
    """Asks for a stop after some steps."""

    def __init__(self, steps: int) -> None:
        self.token, self.left = rf.StopToken(), steps

    def __call__(self, event: Event) -> None:
        self.left -= isinstance(event, Step)
        if self.left == 0:
            self.token.stop()


@pytest.fixture(scope="module")
def undisturbed(cells, tmp_path_factory) -> Callable[[Any], tuple[rf.TrainResult, Path]]:
    """Return the run of a strategy that nothing interrupted, made once."""
    made: dict[str, tuple[rf.TrainResult, Path]] = {}

    def make(strategy: Any) -> tuple[rf.TrainResult, Path]:
        name = str(strategy)
        if name not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            made[name] = run(cells, folder, strategy=strategy), folder
        return made[name]

    return make


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        pytest.param("full", 1, id="first epoch"),
        pytest.param("full", 2, id="end of an epoch"),
        pytest.param("full", 5, id="last epoch"),
        pytest.param({"kind": "late", "blocks": 2}, 3, id="features kept"),
        pytest.param({"kind": "lora", "dropout": 0.3}, 3, id="adapters"),
    ],
)
def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(cells, undisturbed, tmp_path, strategy, steps):
    whole, folder = undisturbed(strategy)
    stop = StopAfter(steps)
    settings = {**SMALL, "training": TRAINING, "strategy": strategy}
    halted = rf.train(
        cells / "images",
        cells / "labels",
        model=cells / "start.pt",
        output=tmp_path / "halted",
        on_event=stop,
        stop=stop.token,
        **settings,
    )
    assert halted.status == "stopped"
    resumed = rf.resume(tmp_path / "halted")
    assert (resumed.status, resumed.best_epoch) == (whole.status, whole.best_epoch)
    assert resumed.best_metric == whole.best_metric
    for name in ("latest", "best"):
        expected = weights(folder / "checkpoints" / name)
        found = weights(tmp_path / "halted" / "checkpoints" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    rows = (tmp_path / "halted" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2"]


def test_a_finished_run_has_nothing_left_to_do_unless_it_gets_more_epochs(cells, tmp_path):
    run(cells, tmp_path / "run", training={"epochs": 1})
    again = rf.resume(tmp_path / "run")
    assert (again.status, again.best_epoch) == ("finished", 0)
    more = rf.resume(tmp_path / "run", epochs=2)
    assert more.status == "finished"
    assert len((tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_alternating_is_a_step_for_the_masks_and_then_one_for_the_instances(cells, tmp_path):
    settings = {"epochs": 1, "samples_per_epoch": 2, "batch_size": 1, "learning_rate": 1e-4}
    events: list[Event] = []
    run(cells, tmp_path / "alternating", events, training={**settings, "update": "alternating"})
    both = [event for event in events if isinstance(event, Step)]
    assert all(step.mask_loss is not None and step.instance_loss is not None for step in both)
    run(cells, tmp_path / "together", training=settings)
    one, other = (weights(tmp_path / name / "checkpoints" / "latest") for name in ("alternating", "together"))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    # One step each: AdamW moves a parameter that both losses touch twice, any other once, by about the learning rate.
    run(cells, tmp_path / "first", training={**settings, "samples_per_epoch": 1, "update": "alternating"})
    start, after = load_model(cells / "start.pt"), weights(tmp_path / "first" / "checkpoints" / "latest")
    moved = {
        key: (after[f"model.{key}"] - value).abs().max().item()
        for key, value in start.sam.state_dict().items()
        if key in ("image_encoder.neck.0.weight", "mask_decoder.output_hypernetworks_mlps.0.layers.0.weight")
    }
    assert moved["image_encoder.neck.0.weight"] == pytest.approx(2e-4, rel=0.05)
    assert moved["mask_decoder.output_hypernetworks_mlps.0.layers.0.weight"] == pytest.approx(1e-4, rel=0.05)


def test_micro_batches_and_checkpointing_change_nothing_but_rounding(cells, tmp_path):
    settings = {"epochs": 1, "samples_per_epoch": 6, "batch_size": 2, "learning_rate": 1e-5}
    plain, other = [], []
    run(cells, tmp_path / "plain", plain, training=settings)
    resources = {
        **SMALL["resources"],
        "micro_batch": 2,
        "checkpoint_encoder": True,
        "checkpoint_instance_decoder": True,
        "object_chunk": 1,
    }
    run(cells, tmp_path / "other", other, training=settings, resources=resources)
    losses = [[event.loss for event in events if isinstance(event, Step)] for events in (plain, other)]
    # AdamW makes whole steps of gradients that are nothing but rounding: from the second step on the weights differ,
    # and a corrective point may lie elsewhere. All steps are therefore compared as a whole.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    start = {f"model.{name}": value for name, value in load_model(cells / "start.pt").sam.state_dict().items()}
    one, two = (
        torch.cat([(found[name] - start[name]).flatten() for name in start if start[name].is_floating_point()])
        for found in (weights(tmp_path / name / "checkpoints" / "latest") for name in ("plain", "other"))
    )
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99


@pytest.mark.parametrize(
    ("strategy", "targets", "learning"),
    [
        ("late", "masks", {"image_encoder", "prompt_encoder", "mask_decoder"}),
        ("lora", "both", {"image_encoder", "prompt_encoder", "mask_decoder", "instance_decoder"}),
        ("frozen", "both", {"prompt_encoder", "mask_decoder", "instance_decoder"}),
        ("frozen", "instances", {"instance_decoder"}),
        ("full", "masks", {"image_encoder", "prompt_encoder", "mask_decoder"}),
    ],
)
def test_only_what_should_learn_changes(cells, tmp_path, strategy, targets, learning):
    run(cells, tmp_path / "run", strategy=strategy, training={"targets": targets, "epochs": 1, "samples_per_epoch": 2})
    before = load_model(cells / "start.pt", decoder="new")
    after = load_model(tmp_path / "run", decoder="none" if targets == "masks" else "required")
    changed = {
        name.split(".")[0]
        for name, value in after.sam.state_dict().items()
        if not torch.equal(value, before.sam.state_dict()[name])
    }
    if after.instance_decoder is not None:
        state = before.instance_decoder.state_dict()
        if any(not torch.equal(v, state[k]) for k, v in after.instance_decoder.state_dict().items()):
            changed.add("instance_decoder")
    assert changed == learning


def test_features_are_computed_in_the_first_epoch_alone_and_go_when_the_run_has_finished(cells, tmp_path, monkeypatch):
    from napari_resfinetune.training.feature_cache import FeatureCache

    misses: list[int] = []
    get = FeatureCache.get

    def counted(self, *args):
        found = get(self, *args)
        misses.append(self.misses)
        return found

    monkeypatch.setattr(FeatureCache, "get", counted)
    events: list[Event] = []
    run(cells, tmp_path / "run", events, strategy="frozen")
    asked_per_epoch = (len(misses) - 1) // 3  # one more, to say beforehand what it takes
    assert 4 < misses[asked_per_epoch] == misses[-1]
    said = [event.text for event in events if isinstance(event, Message) and "frozen features" in event.text]
    assert len(said) == 1 and "first epoch alone" in said[0]
    assert not (tmp_path / "run" / "features").exists()
    assert read_config(tmp_path / "run" / "config.yaml").training.patch_bank == 4
    shared = {**SMALL["resources"], "feature_cache_dir": str(tmp_path / "shared")}
    run(cells, tmp_path / "one", strategy="frozen", resources=shared)
    before = misses[-1]
    run(cells, tmp_path / "two", strategy="frozen", resources=shared)
    assert before > 0 and misses[-1] == 0
    assert (tmp_path / "shared").is_dir()


def test_a_lora_run_leaves_an_adapter_that_is_its_model(cells, tmp_path):
    run(cells, tmp_path / "run", strategy="lora", training={"epochs": 1})
    adapter, merged = load_model(tmp_path / "run" / "adapter"), load_model(tmp_path / "run")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(adapter.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert adapter.meta["patch_px"] == merged.meta["patch_px"]
    image = tifffile.imread(cells / "images" / "c0.tif")
    segmented = [rf.segment(image, model=tmp_path / name, mode="ais") for name in ("run", "run/adapter")]
    assert np.array_equal(*segmented)
    again = rf.train(
        cells / "images",
        cells / "labels",
        model=tmp_path / "run" / "adapter",
        output=tmp_path / "more",
        strategy={"kind": "late_lora", "blocks": 1},
        **{**SMALL, "training": {**TRAINING, "epochs": 1}},
    )
    assert again.status == "finished"
    assert load_model(tmp_path / "more" / "adapter").architecture == "vit_t"


def test_early_stopping_ends_a_run_that_gets_no_better(cells, tmp_path):
    events: list[Event] = []
    result = run(
        cells,
        tmp_path / "run",
        events,
        training={
            "learning_rate": 1e-12,
            "epochs": 50,
            "early_stopping": 2,
            "samples_per_epoch": 1,
            "targets": "masks",
        },
    )
    assert result.status == "early_stopped"
    assert sum(isinstance(event, EpochEnded) for event in events) == result.best_epoch + 3
    again: list[Event] = []
    assert rf.resume(tmp_path / "run", on_event=again.append).status == "early_stopped"
    assert not any(isinstance(event, Step) for event in again)


def test_a_run_ends_when_its_minutes_are_over(cells, tmp_path):
    """In the middle of an epoch, which is validated; a longer time goes on with the next one."""
    events: list[Event] = []
    result = run(cells, tmp_path / "run", events, training={"epochs": 2, "samples_per_epoch": 400, "minutes": 0.05})
    steps = [event for event in events if isinstance(event, Step)]
    (ended,) = (event for event in events if isinstance(event, EpochEnded))
    assert result.status == "finished" and result.seconds > 3
    assert 1 <= len(steps) < 200
    assert ended.train_loss == pytest.approx(np.mean([step.loss for step in steps]))
    assert (tmp_path / "run" / "model.pt").is_file()
    again: list[Event] = []
    assert rf.resume(tmp_path / "run", on_event=again.append).status == "finished"
    assert not any(isinstance(event, Step) for event in again)
    longer = result.seconds / 60 + 0.05
    rf.resume(tmp_path / "run", minutes=longer, on_event=again.append)
    assert {event.epoch for event in again if isinstance(event, Step)} == {1}
    assert read_config(tmp_path / "run" / "config.yaml").training.minutes == longer, "for whoever goes on after that"
    with pytest.raises(rf.ConfigError, match="epochs: found 0"):
        rf.resume(tmp_path / "run", epochs=0)


def test_nothing_is_overwritten_and_a_refused_run_leaves_nothing(cells, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(rf.ConfigError, match="already holds files"):
        run(cells, taken)
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    with pytest.raises(rf.ModelError):
        rf.train(cells / "images", cells / "labels", model="vit_x", output=tmp_path / "new")
    with pytest.raises(rf.DataError):
        rf.train(cells / "images", cells, model="random:vit_t", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_arrays_train_without_any_file(cells, tmp_path):
    images = [tifffile.imread(path) for path in sorted((cells / "images").iterdir())]
    labels = [tifffile.imread(path) for path in sorted((cells / "labels").iterdir())]
    settings = {**SMALL, "training": {**TRAINING, "epochs": 1, "samples_per_epoch": 2}}
    result = rf.train(images, labels, model=cells / "start.pt", output=tmp_path / "run", **settings)
    assert result.status == "finished"
    with pytest.raises(rf.ConfigError, match="arrays"):
        rf.resume(tmp_path / "run")
    assert rf.resume(tmp_path / "run", images, labels).status == "finished"


def test_a_run_is_continued_with_its_own_settings_or_not_at_all(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(cells)
    settings = {**SMALL, "training": {**TRAINING, "epochs": 1, "samples_per_epoch": 2}}
    rf.train("images", "labels", model="start.pt", output=tmp_path / "run", **settings)
    monkeypatch.chdir(tmp_path)
    assert rf.resume("run").status == "finished"
    images, labels, model = cells / "images", cells / "labels", cells / "start.pt"
    with (
        training_alone(RunFolder(Path("run"))),
        pytest.raises(rf.ConfigError, match="run: another process is training here"),
    ):
        rf.train(images, labels, model=model, output="run", resume=True, **settings)
    again = rf.train(images, labels, model=model, output="run", resume=True, **settings)
    assert again.status == "finished"
    with pytest.raises(rf.ConfigError, match=r"another data\.images"):
        rf.train(labels, labels, output="run", resume=True)
    for changed in ({"data": {"patch_px": 80}}, {"training": {**settings["training"], "seed": 5}}):
        with pytest.raises(rf.ConfigError, match="holds a run with another"):
            rf.train(images, labels, model=model, output="run", resume=True, **{**settings, **changed})


def test_a_checkpoint_is_also_written_within_an_epoch(cells, tmp_path):
    events: list[Event] = []
    run(cells, tmp_path / "run", events, training={"epochs": 1, "samples_per_epoch": 6, "save_minutes": 1e-6})
    kinds = [type(event) for event in events if isinstance(event, Step | Checkpointed | EpochEnded)]
    assert kinds[:4] == [Step, Checkpointed, Step, Checkpointed]
