"""A finetuned model as an adapter: the few weights that LoRA added, the decoders, and which base they belong to.

The folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as peft writes them for the image encoder
(with its joint projections taken apart, see `lora`), ``decoders.safetensors`` with everything outside of the image
encoder, and ``resfinetune.json`` with the name and hash of the base.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from napari_resfinetune.errors import ModelError
from napari_resfinetune.models.adapter_files import DECODERS, FORMAT, ORIGIN, WEIGHTS, read_origin
from napari_resfinetune.models.build import SamModel, new_instance_decoder, parts
from napari_resfinetune.models.lora import load_lora_state, lora_state
from napari_resfinetune.models.strategies import apply_strategy, encoder_hash
from napari_resfinetune.models.weights import check_state, load_safetensors, save_safetensors, whole_folder

# What peft puts before the names of the model that it wraps.
_PREFIX = "base_model.model."


def save_adapter(folder: Path, model: SamModel, base_model: str, meta: Mapping[str, Any] | None = None) -> None:
    """Write the adapter of a model that `apply_strategy` gave one; replaces `folder` as a whole.

    Raises
    ------
    ModelError
        When the model has none, or the folder cannot be written.
    """
    if model.lora is None:
        raise ModelError(f"{model.name}: has no adapter; train it with strategy lora or late_lora")
    config, state = lora_state(model.sam.image_encoder)
    others = {name: part for name, part in parts(model).items() if name != "image_encoder"}
    origin = {
        "format": FORMAT,
        "base_model": base_model,
        "architecture": model.architecture,
        "encoder_sha256": model.lora.encoder_sha256,
        "strategy": model.lora.strategy.model_dump(),
        "meta": dict(meta or {}),
    }
    config = copy.copy(config)
    config.base_model_name_or_path = base_model
    try:
        with whole_folder(folder) as new:
            config.save_pretrained(str(new))
            save_safetensors(new / WEIGHTS, {_PREFIX + name: tensor for name, tensor in state.items()})
            save_safetensors(
                new / DECODERS,
                {f"{name}.{key}": value for name, part in others.items() for key, value in part.state_dict().items()},
            )
            (new / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written ({error}); free space or choose another folder") from None


def add_adapter(model: SamModel, folder: Path, *, with_instance_decoder: bool) -> None:
    """Turn the base of an adapter into the finetuned model, in place: adapters merged, decoders replaced.

    Parameters
    ----------
    model
        The base.
    folder
        The adapter.
    with_instance_decoder
        Whether its instance decoder is wanted, where it has one.

    Raises
    ------
    ModelError
        When the model is another one than the adapter was trained on, or files do not fit.
    """
    origin = read_origin(folder)
    found = encoder_hash(model)
    if (model.architecture, found) != (origin.architecture, origin.encoder_sha256):
        raise ModelError(
            f"{folder}: was trained on {origin.base_model} ({origin.architecture}, image encoder "
            f"{origin.encoder_sha256[:12]}), but this model is {model.name} ({model.architecture}, {found[:12]}); give "
            f"the base that it was trained on as base_model in {folder / ORIGIN}"
        )
    tensors = load_safetensors(folder / DECODERS)
    for name in ("prompt_encoder", "mask_decoder"):
        _fill(getattr(model.sam, name), name, tensors, folder)
    model.instance_decoder = None
    if with_instance_decoder and any(key.startswith("instance_decoder.") for key in tensors):
        model.instance_decoder = new_instance_decoder(model.sam.image_encoder).to(model.device)
        _fill(model.instance_decoder, "instance_decoder", tensors, folder)
    apply_strategy(model, origin.strategy.model_copy(update={"quantize": False}), "masks")
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_safetensors(folder / WEIGHTS).items()}
    load_lora_state(model.sam.image_encoder, state, str(folder / WEIGHTS))
    model.merge_adapters()
    model.requires_grad_(True)
    model.meta = origin.meta


def _fill(module: Any, name: str, tensors: Mapping[str, Any], folder: Path) -> None:
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    check_state(state, module.state_dict(), folder / DECODERS)
    module.load_state_dict(state)
