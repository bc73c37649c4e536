"""Train the embedded start model from random weights on generated images: hours on a CPU, minutes on a card.

    python scripts/pretrain_starter.py work/starter --steps 6000
    python scripts/pretrain_starter.py work/starter --steps 6000     # again: goes on where it stopped
    python scripts/pretrain_starter.py work/starter --minutes 6 --batch 32 --workers 15    # on a card
    python scripts/pretrain_starter.py work/masks --start STARTER --masks-only --window-px 256 256 512
    python scripts/pretrain_starter.py work/starter --pack src/napari_resfinetune/models/starter.safetensors

Each step sees new windows of generated fields, at the scale of SAM's 1024 px input: `vit_t` has no absolute positions,
so that what it learns from a window holds for the whole field. Both decoders learn, with the parts of this package's
training step; all windows of a batch go through each part together, so that a card is not kept waiting. The packed
weights are the running average. Nothing but generated images goes in.

The mask decoder knows where in the field it is, so windows lie anywhere in it. It can also learn alone, behind an
encoder that stays as it is.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from napari_resfinetune.data.patches import PADDING_RGB, Patch, instance_targets
from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
from napari_resfinetune.data.sources import open_array
from napari_resfinetune.data.synthetic import MODALITIES, make_sample
from napari_resfinetune.models import load_model, measure_batch_norm, to_model_input
from napari_resfinetune.models.build import new_model
from napari_resfinetune.models.instance_decoder import run_instance_decoder
from napari_resfinetune.planning import choose_precision, pick_device, probe_hardware
from napari_resfinetune.training.losses import instance_loss
from napari_resfinetune.training.prompts import PromptPlan, Prompts, plan_training_prompts
from napari_resfinetune.training.step import DTYPES, StepSettings, autocast, encode_patches, mask_part

FIELD_PX, MIN_OBJECT_PX = 1024, 25
# How often each modality is drawn; histology and phase contrast are the hardest to learn.
SHARES = {
    "fluorescence_nuclei": 0.27,
    "crowded_cytoplasm": 0.16,
    "phase_contrast": 0.22,
    "brightfield": 0.1,
    "histology": 0.25,
}
# SAM pads fields that are not square, and we pad those below a patch; a decoder that never saw padding is lost there.
PADDED_SHARE = 0.35
DECAYING_SHARE = 0.3
PATCHES_TO_MEASURE, LOG_EVERY, SAVE_EVERY = 32, 25, 100
MOST_STEPS = 1_000_000


class Windows(Dataset[Patch]):
    """Windows of generated fields; a window depends on its number alone."""

    def __init__(self, sides_px: Sequence[int], batch: int, count: int) -> None:
        self.sides_px, self.batch, self.count = sides_px, batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Patch:
        for attempt in range(100):
            rng = np.random.default_rng([number, attempt])
            modality = str(rng.choice(MODALITIES, p=[SHARES[name] for name in MODALITIES]))
            side = self.sides_px[number // self.batch % len(self.sides_px)]
            sample = make_sample(modality, seed=int(rng.integers(2**31)), shape=(side, side), field_px=FIELD_PX)
            patch = self._to_patch(sample.image, sample.labels.astype(np.int64), rng, number)
            if patch is not None:
                return patch
        raise RuntimeError(f"window {number}: no object in 100 tries")

    def _to_patch(self, image: Any, labels: Any, rng: np.random.Generator, number: int) -> Patch | None:
        source = open_array(image, axes="YXC" if image.ndim == 3 else "YX")
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
        scaled = apply_scaling(rgb, measure_scaling(source))
        if rng.random() < PADDED_SHARE:
            side = len(labels)
            height, width = (int(side * min(1.0, rng.uniform(0.35, 1.4))) for _ in range(2))
            for where in (np.s_[height:, :], np.s_[:, width:]):
                scaled[where], labels[where] = PADDING_RGB, 0
        targets = instance_targets(labels, MIN_OBJECT_PX)
        if targets is None:
            return None
        image_cyx = torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))
        return Patch(image_cyx, torch.from_numpy(targets[0].astype(np.int32)), torch.from_numpy(targets[1:]), number)


def main() -> None:
    """Train, or pack what was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where state and curve are kept")
    parser.add_argument("--steps", type=int, default=6000, help="of the whole training; sets the learning rate's decay")
    parser.add_argument("--minutes", type=float, help="of the whole training, instead of steps")
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--window-px", type=int, nargs="+", default=[320], help="sides, used in turn")
    parser.add_argument("--masks-only", action="store_true", help="train mask decoder and prompt encoder alone")
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of prompts")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up-steps", type=int, default=100)
    parser.add_argument("--average-decay", type=float, default=0.998, help="of the running average, for each step")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw windows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--start", type=Path, help="packed weights to begin with, instead of random ones")
    parser.add_argument("--pack", type=Path, help="write the average as 16-bit safetensors to this file, and stop")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.pack:
        pack(options.folder / "state.pt", options.pack)
        return
    Pretraining(options).run()


class Pretraining:
    """The model, its average, the optimizer, and where they stand."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        hardware = probe_hardware()
        device = pick_device(options.device, hardware)[0]
        precision = choose_precision("auto", device, hardware)
        self.settings = StepSettings(autocast=DTYPES[precision.name if precision.name != "fp16" else "fp32"])
        self.device = torch.device(device)
        steps = MOST_STEPS if options.minutes else options.steps
        self.windows = Windows(options.window_px, options.batch, steps * options.batch)
        if options.start:
            self.model = load_model(options.start, device=self.device)
        else:
            self.model = new_model("vit_t", seed=0, device=self.device)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.average_decay))
        if options.masks_only:
            self.model.requires_grad_(False)
            for part in (self.model.sam.mask_decoder, self.model.sam.prompt_encoder):
                part.requires_grad_(True)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.02, fused=True)
        self.step, self.seconds, self.state = 0, 0.0, options.folder / "state.pt"
        options.folder.mkdir(parents=True, exist_ok=True)
        if self.state.is_file():
            self._load()
        elif not options.start:
            patches = (self.windows[i].image[None].to(self.device) for i in range(PATCHES_TO_MEASURE))
            measure_batch_norm(
                self.model.sam.image_encoder, (to_model_input(patch, patch.shape[-1])[0] for patch in patches)
            )
            self.average.module.load_state_dict(self.model.state_dict())

    def run(self) -> None:
        """Train to the last step, saving on the way."""
        options, sums, logged = self.options, torch.zeros(3, device=self.device), self.seconds
        remaining = range(self.step * options.batch, len(self.windows))
        loader = DataLoader(
            self.windows,
            batch_sampler=BatchSampler(remaining, options.batch, drop_last=False),
            num_workers=options.workers,
            collate_fn=self._collate,
        )
        self.model.train()
        began = time.monotonic() - self.seconds
        for images, targets, owners, plan in loader:
            images, targets, owners = (part.to(self.device) for part in (images, targets, owners))
            sums += self._take_step(images, targets, owners, plan)
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.step % LOG_EVERY == 0:
                self._log((sums / LOG_EVERY).tolist(), (self.seconds - logged) / LOG_EVERY)
                sums, logged = torch.zeros_like(sums), self.seconds
            if self._left() <= 0:
                break
            if self.step % SAVE_EVERY == 0:
                self._save()
        self._save()

    def _collate(self, batch: list[Patch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PromptPlan]:
        """Return images "BCYX", targets "BCYX", the window of each object "N", and one plan for all objects."""
        plans = [
            plan_training_prompts(
                patch.labels,
                np.random.default_rng([7, patch.number]),
                step=batch[0].number // self.options.batch,
                objects=self.options.objects,
                sub_iterations=self.options.rounds,
                mask_prompt_probability=0.5,
            )
            for patch in batch
        ]
        owners = torch.repeat_interleave(torch.tensor([len(plan.masks) for plan in plans]))
        images, targets = (torch.stack(parts) for parts in zip(*((p.image, p.targets) for p in batch), strict=True))
        return images, targets, owners, _joined(plans)

    def _take_step(
        self, images: torch.Tensor, targets: torch.Tensor, owners: torch.Tensor, plan: PromptPlan
    ) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * self._decay()
        self.optimizer.zero_grad(set_to_none=True)
        windows = [Patch(image, image, image, 0) for image in images]  # the encoder looks at the pixels alone
        side_px = int(images.shape[-1])
        settings = replace(self.settings, input_px=side_px)
        with torch.set_grad_enabled(not self.options.masks_only):
            embedding, input_size = encode_patches(self.model, windows, settings)
        leaf = embedding.detach().requires_grad_()
        instance = torch.zeros((), device=self.device)
        if not self.options.masks_only:
            with autocast(self.device, settings):
                predicted = run_instance_decoder(self.model.instance_decoder, leaf, input_size, (side_px, side_px))
            instance = instance_loss(predicted.float(), targets)
            instance.backward()
        each = leaf.detach()[owners].requires_grad_()
        sums = torch.zeros(2, device=self.device)
        for parts in mask_part(self.model, each, plan, input_size, settings):
            (parts[0] + parts[1]).backward()
            sums += torch.stack(parts).detach()
        if not self.options.masks_only and leaf.grad is not None and each.grad is not None:
            embedding.backward(leaf.grad.index_add(0, owners, each.grad))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        losses = torch.cat([sums, instance.detach()[None]])
        if bool(losses.isfinite().all()):
            self.optimizer.step()
            self.average.update_parameters(self.model)
        return losses

    def _left(self) -> float:
        """Return the share of the training that is still to come."""
        if self.options.minutes:
            return 1 - self.seconds / (60 * self.options.minutes)
        return 1 - self.step / self.options.steps

    def _decay(self) -> float:
        """Return the factor on the learning rate: up, level, and down in the end, so that a run can be prolonged."""
        return max(0.0, min(1.0, (self.step + 1) / self.options.warm_up_steps, self._left() / DECAYING_SHARE))

    def _log(self, means: Any, seconds: float) -> None:
        curve = self.options.folder / "curve.csv"
        new = not curve.exists()
        with curve.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "mask_loss", "iou_loss", "instance_loss", "seconds_per_step"])
            print(f"step {self.step}, {means[0]:.3f} {means[1]:.3f} {means[2]:.3f}, {seconds:.2f} s a step", flush=True)
            writer.writerow([self.step, *(f"{value:.4f}" for value in means), f"{seconds:.2f}"])

    def _save(self) -> None:
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.state.with_suffix(".part")
        torch.save(content, temporary)
        os.replace(temporary, self.state)

    def _load(self) -> None:
        content = torch.load(self.state, map_location=self.device, weights_only=True)
        self.step, self.seconds = content["step"], content["seconds"]
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])


def _joined(plans: list[PromptPlan]) -> PromptPlan:
    """Make one plan of several: all start from the same kind of prompt, and later rounds follow the first plan."""

    def together(parts: list[Any]) -> Any:
        return None if parts[0] is None else torch.cat(parts)

    firsts = [plan.first for plan in plans]
    return PromptPlan(
        masks=torch.cat([plan.masks for plan in plans]),
        first=Prompts(
            *(together([getattr(first, name) for first in firsts]) for name in ("points", "point_labels", "boxes"))
        ),
        multimask=plans[0].multimask,
        draws=torch.cat([plan.draws for plan in plans], 1),
        mask_prompts=plans[0].mask_prompts,
        place=plans[0].place,
    )


def pack(state: Path, path: Path) -> None:
    """Write the averaged weights as 16-bit safetensors."""
    from napari_resfinetune.models.weights import save_safetensors

    average = AveragedModel(new_model("vit_t", seed=0))
    average.load_state_dict(torch.load(state, map_location="cpu", weights_only=True)["average"])
    model: Any = average.module
    tensors = dict(model.sam.state_dict())
    tensors |= {f"instance_decoder.{name}": value for name, value in model.instance_decoder.state_dict().items()}
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_safetensors(path, half)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
