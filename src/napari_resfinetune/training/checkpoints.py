"""Checkpoints that no crash leaves half-written, and a run that continues exactly where it was."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from napari_resfinetune.errors import ModelError, ResourceError
from napari_resfinetune.models import SamModel
from napari_resfinetune.models.lora import state_to_keep
from napari_resfinetune.models.weights import (
    check_state,
    load_safetensors,
    old_folder,
    save_safetensors,
    whole_folder,
)

FORMAT = 1


@dataclass
class Progress:
    """Where a run stands; the only thing about it that changes besides weights and optimizer.

    Attributes
    ----------
    epoch, step
        The next step to take.
    loss_sum
        Sum of the training losses of this epoch so far.
    best_metric, best_epoch
        Lowest validation metric so far and its epoch.
    seconds
        Time spent training, over all sessions.
    levers
        Settings that were changed when memory ran out, by their keys in the configuration.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_metric: float = math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    levers: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    model: SamModel,
    progress: Progress,
    optimizer: Optimizer | None = None,
    scheduler: ReduceLROnPlateau | None = None,
    scaler: GradScaler | None = None,
) -> None:
    """Write a checkpoint beside `folder`, then put it in its place.

    Parameters
    ----------
    folder
        ``checkpoints/latest`` or another name; replaced as a whole.
    optimizer, scheduler, scaler
        What training needs to go on; without them the checkpoint serves prediction only.

    Raises
    ------
    ResourceError
        When it cannot be written; the checkpoint before it stays.
    """
    state: dict[str, Any] = {"format": FORMAT, "architecture": model.architecture, **dataclasses.asdict(progress)}
    if model.lora is not None:
        state["base_sha256"] = model.lora.encoder_sha256
    if not math.isfinite(progress.best_metric):
        state["best_metric"] = None
    try:
        with whole_folder(folder) as new:
            save_safetensors(new / "model.safetensors", state_to_keep(model.sam))
            if model.instance_decoder is not None:
                save_safetensors(new / "instance_decoder.safetensors", model.instance_decoder.state_dict())
            if optimizer is not None and scheduler is not None:
                training = {
                    "scheduler": scheduler.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                }
                torch.save(training, new / "optimizer.pt")
            (new / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
    except (OSError, RuntimeError, ModelError) as error:  # torch and safetensors report a full disk in their own way
        raise ResourceError(
            f"{folder}: the checkpoint could not be written ({error}); free disk space, then resume"
        ) from error


def keep_checkpoint(folder: Path, name: str) -> Path:
    """Copy a checkpoint to another name beside it, whole or not at all.

    Raises
    ------
    ResourceError
        When it cannot be written.
    """
    kept = folder.with_name(name)
    try:
        with whole_folder(kept) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{kept}: the checkpoint could not be written ({error}); free disk space") from error
    return kept


def find_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint called `folder`, also when a crash fell between its two renames."""
    for candidate in (folder, old_folder(folder)):
        if (candidate / "state.json").is_file():
            return candidate
    return None


def load_weights(folder: Path, model: SamModel) -> None:
    """Load the weights of a checkpoint into a model of the same architecture.

    Raises
    ------
    ModelError
        When files are missing or damaged, or of another architecture.
    """
    state = read_state(folder)
    if state["architecture"] != model.architecture:
        raise ModelError(f"{folder}: holds {state['architecture']}, but the run is set to {model.architecture}")
    if model.lora is not None and state.get("base_sha256") != model.lora.encoder_sha256:
        raise ModelError(
            f"{folder}: its adapters were trained on other weights than {model.name} has now; put the start model back "
            "as it was, or start a new run"
        )
    parts: list[tuple[str, torch.nn.Module | None]] = [
        ("model.safetensors", model.sam),
        ("instance_decoder.safetensors", model.instance_decoder),
    ]
    for name, module in parts:
        if module is None:
            continue
        state = load_safetensors(folder / name)
        check_state(state, state_to_keep(module), folder / name)
        module.load_state_dict(state, strict=False)


def load_training(
    folder: Path, optimizer: Optimizer, scheduler: ReduceLROnPlateau, scaler: GradScaler | None
) -> Progress:
    """Load what training needs to go on, and return where it stood.

    Raises
    ------
    ModelError
        When the checkpoint is damaged or was written for prediction only.
    """
    state = read_state(folder)
    path = folder / "optimizer.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
    except FileNotFoundError:
        raise ModelError(f"{path}: missing, so the run cannot go on; start a new run from this model") from None
    except Exception as error:
        raise ModelError(f"{path}: cannot be read ({error}); start a new run from checkpoints/best") from error
    fields = {field.name: state[field.name] for field in dataclasses.fields(Progress) if field.name in state}
    if fields["best_metric"] is None:
        fields["best_metric"] = math.inf
    return Progress(**fields)


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json``.

    Raises
    ------
    ModelError
        When it is missing or damaged.
    """
    path = folder / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); the checkpoint is damaged") from None
    if not isinstance(state, dict):
        raise ModelError(f"{path}: holds a {type(state).__name__}; the checkpoint is damaged")
    if state.get("format") != FORMAT:
        raise ModelError(f"{path}: format {state.get('format')}; this version reads format {FORMAT}")
    return state
