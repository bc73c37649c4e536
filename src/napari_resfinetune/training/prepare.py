"""From a configuration to a training job: data, split, device, precision, model."""

from __future__ import annotations

import functools
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from napari_resfinetune.config import FinetuneConfig, not_given
from napari_resfinetune.data.doctor import CheckReport, check_pairs
from napari_resfinetune.data.pairs import Pair, find_pairs, join_held_out
from napari_resfinetune.data.patches import TrainingPatches, ValidationPatches, measure_scalings
from napari_resfinetune.data.split import Split, split_pairs, whole_regions
from napari_resfinetune.errors import ConfigError, DataError, ResourceError
from napari_resfinetune.models import (
    ModelLocation,
    TrainableReport,
    apply_strategy,
    known_model,
    load_model,
    measure_batch_norm,
    to_model_input,
)
from napari_resfinetune.planning import (
    Hardware,
    Limits,
    PrecisionChoice,
    Work,
    auto_preset,
    choose_limits,
    choose_precision,
    device_of,
    get_preset,
)
from napari_resfinetune.training.job import TrainingJob
from napari_resfinetune.training.run_folder import RunFolder
from napari_resfinetune.training.step import frozen_units, step_settings
from napari_resfinetune.words import counted

PATCHES_TO_MEASURE = 16
COMPILERS = ("g++", "clang++", "cl")
# Strategies whose frozen blocks are worth keeping. LoRA leaves the first blocks of vit_t alone, but they are cheap, and
# new patches are worth more.
WITH_FEATURES = ("frozen", "late", "late_lora")


@dataclass(frozen=True)
class OpenedData:
    """Checked and split training data."""

    pairs: tuple[Pair, ...]
    split: Split
    report: CheckReport


@dataclass(frozen=True)
class Setup:
    """How this machine will run the job, in plain values."""

    preset: str
    device: str
    precision: PrecisionChoice
    workers: int
    limits: Limits
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `plan.json`."""
        return {
            "preset": self.preset,
            "device": self.device,
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "workers": self.workers,
            "threads": self.limits.threads,
            "limit_reason": self.limits.reason,
            "notes": list(self.notes),
        }


def open_data(config: FinetuneConfig, images: Any = None, labels: Any = None) -> OpenedData:
    """Find, check and split the data of a configuration.

    Parameters
    ----------
    config
        Names the data, unless `images` and `labels` are given.
    images, labels
        Folders, globs, paths or arrays.

    Raises
    ------
    ConfigError
        When there is no data to look at.
    DataError
        With every problem that stops training.
    """
    data = config.data
    missing = not_given(config, images, labels)
    if missing:
        raise ConfigError(*missing)
    images = images if images is not None else data.images
    labels = labels if labels is not None else data.labels
    options: Mapping[str, Any] = {
        "image_key": data.image_key,
        "label_key": data.label_key,
        "axes": data.axes,
        "channels": data.channels,
    }
    found = find_pairs(images, labels, **options)
    if data.validation_images is None:
        report = check_pairs(found, patch_px=data.patch_px, min_object_px=data.min_object_px)
        report.raise_for_errors()
        split = split_pairs(
            found.pairs,
            validation_fraction=data.validation_fraction,
            max_images=data.max_images,
            seed=config.training.seed,
        )
        return OpenedData(found.pairs, split, report)
    held_out = find_pairs(data.validation_images, data.validation_labels, **options)
    both = join_held_out(found, held_out)
    report = check_pairs(both, patch_px=data.patch_px, min_object_px=data.min_object_px)
    report.raise_for_errors()
    count = len(found.pairs) if data.max_images is None else min(data.max_images, len(found.pairs))
    split = Split(
        "given",
        whole_regions(both.pairs, range(count)),
        whole_regions(both.pairs, range(len(found.pairs), len(both.pairs))),
        f"{counted(count, 'image')} to train on, {len(held_out.pairs)} held out, as given",
    )
    empty = [name for name, part in (("images", split.train), ("held-out images", split.validation)) if not part]
    if empty:
        raise DataError(*(f"{name}: no labelled object in any of them; label some objects" for name in empty))
    return OpenedData(both.pairs, split, report)


def check_same_split(written: Any, data: OpenedData, run: RunFolder) -> None:
    """Refuse to go on with other images than before: what was held out would be learned from.

    Parameters
    ----------
    written
        What ``split.json`` says; `None` when there is none.
    data
        What was opened now.
    run
        Named in the message.

    Raises
    ------
    DataError
        When the two differ.
    """
    if written is None:
        return
    found = json.loads(json.dumps(data.split.to_dict(data.pairs)))
    if not isinstance(written, dict) or any(written.get(part) != found[part] for part in ("train", "validation")):
        raise DataError(
            f"{run.path}: was started with other images or labels than there are now (split.json names them); "
            "put them back, or start a new run from its model"
        )


def choose_setup(config: FinetuneConfig, hardware: Hardware) -> Setup:
    """Choose device, number format and loader processes for this machine.

    Raises
    ------
    ResourceError
        When the configuration asks for what the machine does not have.
    """
    device, notes = device_of(config.resources, hardware)
    if config.resources.compile and device == "cpu" and not any(shutil.which(name) for name in COMPILERS):
        raise ResourceError(
            f"resources.compile: no C++ compiler found (looked for {', '.join(COMPILERS)}); install one, or leave "
            "compile off"
        )
    named = config.resources.preset
    preset = get_preset(auto_preset(hardware, device) if named == "auto" else named)
    kind = device.partition(":")[0]
    if preset.device != kind:
        notes = (*notes, f"preset {preset.name} is for {preset.device}, and this runs on {kind}: its RAM limit counts")
    limits = choose_limits(config.resources, preset, hardware, device)
    cores = min(preset.cores, hardware.physical_cores)
    if config.resources.threads is None and limits.threads < cores:
        notes = (*notes, f"{limits.threads} of {cores} cores, since OMP_NUM_THREADS says so; resources.threads={cores} "
                 "takes all of them")  # fmt: skip
    return Setup(
        preset=preset.name,
        device=device,
        precision=choose_precision(config.resources.precision, device, hardware),
        workers=_workers(config, device, min(limits.threads, hardware.logical_cores)),
        limits=limits,
        notes=tuple(notes),
    )


def settle(config: FinetuneConfig, setup: Setup, model: ModelLocation) -> FinetuneConfig:
    """Fill in what the preset decides and make paths absolute, so that a run can be continued from any folder."""
    if known_model(config.model) is None and Path(config.model).exists():
        config = config.model_copy(update={"model": str(Path(config.model).absolute())})
    config = config.model_copy(update={"data": config.data.with_absolute_paths()})
    if config.resources.feature_cache_dir is not None:
        folder = {"feature_cache_dir": config.resources.feature_cache_dir.absolute()}
        config = config.model_copy(update={"resources": config.resources.model_copy(update=folder)})
    return with_objects(config, setup.preset, model.architecture)


def with_objects(config: FinetuneConfig, preset: str, architecture: str) -> FinetuneConfig:
    """Fill in how many objects per patch a preset trains, unless that is set."""
    if config.training.objects is not None:
        return config
    training = config.training.model_copy(update={"objects": objects_of(preset, architecture)})
    return config.model_copy(update={"training": training})


def objects_of(preset: str, architecture: str) -> int:
    """Return how many objects per patch a preset trains; large models get those of ``vit_b``."""
    objects = get_preset(preset).objects
    return objects.get(architecture, objects["vit_b"])


def work_of(config: FinetuneConfig, architecture: str, device: str, precision: str, workers: int) -> Work:
    """Return what a step's memory and time depend on, of a settled configuration."""
    data, training, resources = config.data, config.training, config.resources
    return Work(
        architecture=architecture,
        strategy=config.strategy,
        targets=training.targets,
        device=device.partition(":")[0],  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        patch_px=data.patch_px,
        input_px=training.input_px,
        positions=training.positions,
        update=training.update,
        objects=training.objects or objects_of("cpu-16gb", architecture),
        sub_iterations=training.sub_iterations,
        batch_size=training.batch_size,
        # Dropout is seeded by the sample, so that neither this nor several processes change what is learned.
        micro_batch=1 if getattr(config.strategy, "dropout", 0.0) else min(resources.micro_batch, training.batch_size),
        object_chunk=resources.object_chunk,
        checkpoint_encoder=resources.checkpoint_encoder,
        checkpoint_instance_decoder=resources.checkpoint_instance_decoder,
        freed_memory=resources.freed_memory,
        compile=resources.compile,
        keep_features=resources.feature_cache == "auto" and config.strategy.kind in WITH_FEATURES,
        workers=workers,
    )


def make_job(
    config: FinetuneConfig,
    run: RunFolder,
    data: OpenedData,
    setup: Setup,
    location: ModelLocation,
    foreign_gb: float = 0.0,
) -> tuple[TrainingJob, TrainableReport]:
    """Load the model and put a job together.

    Parameters
    ----------
    config
        Settled, with the levers of the plan in it.
    run, data, setup, location
        Where results go, what is learned from, on what, and the model's files.
    foreign_gb
        What of this process's RAM belongs to others than training.

    Returns
    -------
    job
        Ready for `Trainer`.
    report
        Which parts learn.

    Raises
    ------
    ModelError
        When the model cannot be loaded.
    """
    targets = config.training.targets
    torch.manual_seed(config.training.seed)
    model = load_model(
        location, decoder="none" if targets == "masks" else "new", device=setup.device, seed=config.training.seed
    )
    scalings = measure_scalings(data.pairs, data.split.train + data.split.validation, config.data)
    draw = functools.partial(
        TrainingPatches,
        data.pairs,
        data.split.train,
        config.data,
        samples_per_epoch=config.training.samples_per_epoch,
        seed=config.training.seed,
        scalings=scalings,
        with_targets=targets != "masks",
    )
    validation = ValidationPatches(
        data.pairs, data.split.validation, config.data, scalings=scalings, with_targets=targets != "masks"
    )
    if config.training.batch_norm == "measure" and model.architecture == "vit_t":
        fresh = draw()
        patches = (fresh[index].image[None].to(setup.device) for index in range(PATCHES_TO_MEASURE))
        measure_batch_norm(
            model.sam.image_encoder, (to_model_input(patch, config.training.input_px)[0] for patch in patches)
        )
    report = apply_strategy(model, config.strategy, targets)
    workers = setup.workers if config.resources.workers is None else config.resources.workers
    work = work_of(config, model.architecture, setup.device, setup.precision.name, workers)
    if work.keep_features and not any(unit.is_block for unit in frozen_units(model, step_settings(work))):
        work = replace(work, keep_features=False)
    if work.keep_features and config.training.patch_bank is None:
        bank = {"patch_bank": config.training.samples_per_epoch}
        config = config.model_copy(update={"training": config.training.model_copy(update=bank)})
    job = TrainingJob(
        config,
        run,
        model,
        draw(bank=config.training.patch_bank),
        validation,
        work,
        use_scaler=setup.precision.scaler,
        base_is_lasting=location.path is not None and config.training.batch_norm == "keep",
        memory_limit_gb=setup.limits.deciding_gb(setup.device),
        foreign_gb=foreign_gb,
    )
    return job, report


def _workers(config: FinetuneConfig, device: str, cores: int) -> int:
    """Loader processes: none where each would cost a fresh interpreter, or where the CPU does the training itself."""
    if config.resources.workers is not None:
        return config.resources.workers
    if device == "cpu" or platform.system() != "Linux":
        return 0
    return min(4, cores // 2)
