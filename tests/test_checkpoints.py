"""Checkpoints: whole or not there, and what is loaded equals what was saved."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from napari_resfinetune.errors import ModelError, ResourceError
from napari_resfinetune.models.build import new_model
from napari_resfinetune.training import checkpoints
from napari_resfinetune.training.checkpoints import (
    Progress,
    find_checkpoint,
    load_training,
    load_weights,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def trained():
    """Return a model, optimizer and scheduler after a few made-up steps."""
    model = new_model("vit_t", seed=1)
    optimizer = AdamW(model.instance_decoder.parameters(), lr=1e-3)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for step in range(3):
        for parameter in model.instance_decoder.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.step()
        scheduler.step(1.0 + step)
    return model, optimizer, scheduler


def fresh():
    model = new_model("vit_t", seed=2)
    optimizer = AdamW(model.instance_decoder.parameters(), lr=1e-3)
    return model, optimizer, ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def test_everything_comes_back(tmp_path, trained):
    progress = Progress(epoch=4, step=2, loss_sum=1.5, best_metric=0.25, best_epoch=3, seconds=12.5)
    save_checkpoint(tmp_path / "latest", trained[0], progress, *trained[1:])
    model, optimizer, scheduler = fresh()
    load_weights(tmp_path / "latest", model)
    assert load_training(tmp_path / "latest", optimizer, scheduler, None) == progress
    for name, value in trained[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert optimizer.param_groups[0]["lr"] == trained[1].param_groups[0]["lr"] < 1e-3
    for a, b in zip(optimizer.state_dict()["state"].values(), trained[1].state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert scheduler.state_dict() == trained[2].state_dict()


def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, trained, monkeypatch):
    folder = tmp_path / "latest"
    save_checkpoint(folder, trained[0], Progress(epoch=1), *trained[1:])

    class Crash(Exception):
        pass

    replace, rmtree = os.replace, shutil.rmtree
    calls = {"left": 0}

    def dying(function):
        def call(*args, **kwargs):
            if calls["left"] == 0:
                raise Crash
            calls["left"] -= 1
            return function(*args, **kwargs)

        return call

    for survived in range(8):
        calls["left"] = survived
        monkeypatch.setattr(os, "replace", dying(replace))
        monkeypatch.setattr(shutil, "rmtree", dying(rmtree))
        with contextlib.suppress(Crash):
            save_checkpoint(folder, trained[0], Progress(epoch=2), *trained[1:])
        monkeypatch.undo()
        whole = find_checkpoint(folder)
        assert whole is not None
        assert checkpoints.read_state(whole)["epoch"] in (1, 2)
        assert (whole / "model.safetensors").stat().st_size > 1e7
        save_checkpoint(folder, trained[0], Progress(epoch=1), *trained[1:])
    assert find_checkpoint(tmp_path / "none") is None


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, trained):
    folder = tmp_path / "latest"
    save_checkpoint(folder, trained[0], Progress(), *trained[1:])
    model, optimizer, scheduler = fresh()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_weights(folder, model)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(ModelError, match=r"optimizer\.pt"):
        load_training(folder, optimizer, scheduler, None)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(ModelError, match=r"optimizer\.pt: missing"):
        load_training(folder, optimizer, scheduler, None)
    (folder / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"state\.json"):
        load_weights(folder, model)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, trained, monkeypatch):
    folder = tmp_path / "latest"
    save_checkpoint(folder, trained[0], Progress(epoch=1), *trained[1:])

    for where, error in (
        ("torch.save", RuntimeError("unexpected pos 64 vs 0")),
        ("napari_resfinetune.models.weights.save_file", OSError(28, "No space left on device")),
    ):

        def full(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(where, full)
        with pytest.raises(ResourceError, match="free disk space"):
            save_checkpoint(folder, trained[0], Progress(epoch=2), *trained[1:])
        monkeypatch.undo()
        assert checkpoints.read_state(folder)["epoch"] == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest"]
