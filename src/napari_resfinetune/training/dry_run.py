"""What a training step takes, found by running its code on tensors that have shapes and no numbers.

So the prediction follows the code: whatever a strategy, a lever or a model changes in the step is in it. Nothing is
computed; torch says what shape each result would have (`FakeTensorMode`), and the bytes of those alive are added up.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from napari_resfinetune.data.patches import Patch
from napari_resfinetune.models import SamModel, apply_strategy
from napari_resfinetune.models import attention as attention_code
from napari_resfinetune.models.build import new_model
from napari_resfinetune.models.encoder import first_that_learns, run_units
from napari_resfinetune.planning.levers import Work
from napari_resfinetune.planning.memory import GB
from napari_resfinetune.planning.planner import StepCost
from napari_resfinetune.training import losses as losses_code
from napari_resfinetune.training.kept_costs import PartCost, kept
from napari_resfinetune.training.losses import low_res_mask_loss
from napari_resfinetune.training.prompts import Prompts
from napari_resfinetune.training.step import (
    StepSettings,
    autocast,
    encoder_units_of,
    instance_part,
    predict_round,
    step_settings,
)

# A box and the points of half of the rounds: what a prompt of a middle round is made of.
POINTS = 4
ADAM_MOMENTS = 2


def step_cost(work: Work) -> StepCost:
    """Return what one optimizer step takes, without computing it.

    Memory is that of tensors; libraries, workspaces and the holes of an allocator come on top (`planning.planner`).
    """
    encoder = _encoder_cost(_only(work, "device", "precision", "input_px", "positions", "checkpoint_encoder",
                                  "micro_batch", "keep_features", "patch_px"))  # fmt: skip
    instance = mask = PartCost()
    if work.targets != "masks":
        instance = _instance_cost(_only(work, "device", "precision", "input_px", "patch_px",
                                        "checkpoint_instance_decoder"))  # fmt: skip
    chunk = min(work.object_chunk or work.objects, work.objects)
    if work.targets != "instances":
        mask = _mask_cost(replace(_only(work, "device", "precision", "input_px", "patch_px", "positions"),
                                  objects=chunk))  # fmt: skip
    held = encoder.held_gb
    if work.batch_size > work.micro_batch:  # gradients of the samples before
        held += encoder.gradients_gb
    parts = {
        "image encoder": max(encoder.forward_gb, encoder.backward_gb + instance.gradients_gb + mask.gradients_gb),
        "instance decoder": held + instance.forward_gb,
        "mask decoder": held + instance.gradients_gb + mask.forward_gb,
    }
    rounds = work.batch_size * work.sub_iterations * work.objects / chunk
    passes = work.batch_size / work.micro_batch * (2 if work.update == "alternating" and work.targets == "both" else 1)
    weights = _weights_cost(_only(work))
    return StepCost(
        weights_gb=weights.held_gb,
        optimizer_gb=ADAM_MOMENTS * weights.gradients_gb,
        activations_gb=parts,
        tflop={
            "image encoder": encoder.tflop * passes,
            "instance decoder": instance.tflop * work.batch_size,
            "mask decoder": mask.tflop * rounds,
        },
        frozen_tflop=encoder.frozen_tflop * passes,
        features_gb=encoder.features_gb,
    )


def _only(work: Work, *fields: str) -> Work:
    """Return the work with everything else at its default, so that what does not matter here is not computed again."""
    kept = {field: getattr(work, field) for field in (*fields, "strategy", "targets")}
    return Work(work.architecture, **kept)


@kept
def _weights_cost(work: Work) -> PartCost:
    parameters = list(_fake_model(work.architecture, work.strategy, work.targets)[1].parameters())
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    all_gb, learning_gb = (4 * sum(each.numel() for each in some) / GB for some in (parameters, learning))
    return PartCost(held_gb=all_gb, gradients_gb=learning_gb)


@kept
def _encoder_cost(work: Work) -> PartCost:
    with _dry(work) as (model, settings, count):
        units = encoder_units_of(model, settings)
        first = first_that_learns(units)
        images = torch.empty(work.micro_batch, 3, work.input_px, work.input_px)
        with autocast(images.device, settings):
            tokens = run_units(units[:first], images)
            frozen = count.flop
            embedding = run_units(units[first:], tokens, checkpoint_units=settings.checkpoint_encoder)
        features = tokens.numel() * 2 / work.micro_batch if work.keep_features and first else 0
        del tokens
        forward, held = count.peak, count.now
        count.peak = count.now
        if embedding.requires_grad:
            embedding.backward(torch.empty_like(embedding))
        return PartCost(
            forward_gb=forward / GB,
            held_gb=held / GB,
            backward_gb=count.peak / GB,
            gradients_gb=count.now / GB,
            tflop=(count.flop - frozen) / 1e12,
            frozen_tflop=frozen / 1e12,
            features_gb=features / GB,
        )


@kept
def _instance_cost(work: Work) -> PartCost:
    with _dry(work) as (model, settings, count):
        leaf = _leaf(work)
        image, labels = torch.empty(3, work.patch_px, work.patch_px), torch.empty(work.patch_px, work.patch_px)
        sample = Patch(image, labels, torch.empty_like(image), 0)
        loss = instance_part(model, leaf, sample, (work.input_px, work.input_px), settings)
        loss.backward()
        del loss  # and with it what its graph holds
        return PartCost(count.peak / GB, gradients_gb=count.now / GB, tflop=count.flop / 1e12)


@kept
def _mask_cost(work: Work) -> PartCost:
    with _dry(work) as (model, settings, count):
        leaf, objects, size = _leaf(work), work.objects, (work.patch_px, work.patch_px)
        prompts = Prompts(torch.empty(objects, POINTS, 2), torch.ones(objects, POINTS, dtype=torch.int32), None)
        masks = torch.zeros(objects, *size, dtype=torch.bool)
        low_res_px = work.input_px // 4
        with autocast(leaf.device, settings):
            low_res, iou = predict_round(
                model, leaf, prompts, torch.empty(objects, 1, low_res_px, low_res_px), size, True, settings
            )
        loss = low_res_mask_loss(low_res, masks, iou, input_size=(work.input_px, work.input_px), input_px=work.input_px)
        (loss.mask + loss.iou).backward()
        del loss, low_res, iou
        return PartCost(count.peak / GB, gradients_gb=count.now / GB, tflop=count.flop / 1e12)


def _leaf(work: Work) -> Tensor:
    side = work.input_px // 16
    return torch.empty(1, 256, side, side, requires_grad=work.encoder_learns)


@contextmanager
def _dry(work: Work) -> Iterator[tuple[SamModel, StepSettings, _Count]]:
    fake, model = _fake_model(work.architecture, work.strategy, work.targets)
    model.train()
    count = _Count()
    try:
        with (
            patch.multiple(
                attention_code,
                # A card's way through attention is another one, and tensors on a card cannot be thought of without one.
                DEVICES_IN_CHUNKS=frozenset({"cpu"} if work.device == "cpu" else ()),
                # Hardly more memory and a quarter of the operations to go through.
                QUERIES_AT_ONCE=4 * attention_code.QUERIES_AT_ONCE,
                _heads=count.first_for_all,
            ),
            patch.object(
                # What is thought of must not stay in the cache of what is computed.
                losses_code,
                "_interpolation",
                losses_code._interpolation.__wrapped__,
            ),
            fake,
            count,
        ):
            yield model, step_settings(work), count
    finally:
        for parameter in model.parameters():
            parameter.grad = None


@functools.lru_cache(maxsize=2)
def _fake_model(architecture: str, strategy: Any, targets: Any) -> tuple[FakeTensorMode, SamModel]:
    model = new_model(architecture, decoder=targets != "masks")
    # Weights in 4 bit need a card to be made; counted as plain ones they are a little too many.
    plain = strategy.model_copy(update={"quantize": False}) if hasattr(strategy, "quantize") else strategy
    apply_strategy(model, plain, targets)
    fake = FakeTensorMode()
    for part in (model.sam, model.instance_decoder):
        for module in part.modules() if part is not None else ():
            for name, weight in module._parameters.items():
                if weight is not None:
                    shape = fake.from_tensor(weight.detach())
                    module._parameters[name] = nn.Parameter(shape, requires_grad=weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fake.from_tensor(buffer)
    return fake, model


class _Count(TorchDispatchMode):
    """Counts what operations cost, and the bytes of all tensors that they made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def first_for_all(self, number: int) -> Iterator[int]:
        """Go through the first of many that cost the same and need their memory one after the other."""
        before = self.flop
        yield 0
        self.flop += (number - 1) * (self.flop - before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func._overloadpacket)
        if cost is not None:
            self.flop += cost(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
