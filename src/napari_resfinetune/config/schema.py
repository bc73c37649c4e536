"""What a run is: one frozen, validated object that drives Python, the command, the window and a cluster job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

PresetName = Literal[
    "auto", "cpu-8gb", "cpu-16gb", "cpu-32gb", "cpu-64gb", "gtx1080", "rtx5000", "v100", "rtx3090", "a100", "mps"
]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Targets = Literal["both", "masks", "instances"]
Positions = Literal["part", "stretched"]
Update = Literal["together", "alternating"]
LoraTarget = Literal["q", "k", "v", "proj", "mlp"]
Locations = str | tuple[str, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class AugmentConfig(_Frozen):
    """How patches are varied while training. Validation patches never are."""

    flips: bool = Field(True, description="mirror patches along either axis")
    rotations: bool = Field(True, description="turn patches by multiples of 90 degrees")
    intensity: float = Field(
        0.2, ge=0, lt=1, description="largest relative change of contrast and brightness; 0 switches it off"
    )


class DataConfig(_Frozen):
    """Which images and labels, and how patches are taken from them."""

    images: Locations | None = Field(None, description="a folder, a glob, or a list of files")
    labels: Locations | None = Field(None, description="a folder, a glob, or a list of files, paired by file stem")
    image_key: str | None = Field(None, description="path of the array inside HDF5 or zarr image files")
    label_key: str | None = Field(None, description="path of the array inside HDF5 or zarr label files")
    axes: str | None = Field(
        None, description="axes of the images, as 'YX', 'YXC', 'CYX', 'ZYX', 'TYX'; found if unset"
    )
    channels: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="which 1 to 3 channels of a multichannel image are shown to the model",
    )
    percentiles: tuple[float, float] = Field(
        (0.1, 99.9), description="intensity percentiles of each image that become 0 and 255"
    )
    patch_px: int = Field(512, ge=64, le=2048, description="side of the square training patch, in image pixels")
    max_images: PositiveInt | None = Field(None, description="use only this many training images (1, 2, 5, 10, ...)")
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="share of the images that is held out")
    validation_images: Locations | None = Field(None, description="held-out images, instead of a share")
    validation_labels: Locations | None = Field(None, description="labels of the held-out images")
    min_object_px: PositiveInt = Field(25, description="smaller objects are not trained on, in pixels")
    augment: AugmentConfig = AugmentConfig()

    def with_absolute_paths(self) -> DataConfig:
        """Return the same data, named from any working directory."""
        named = {}
        for name in ("images", "labels", "validation_images", "validation_labels"):
            value = getattr(self, name)
            if value is not None:
                paths = (value,) if isinstance(value, str) else value
                absolute = tuple(str(Path(path).absolute()) for path in paths)
                named[name] = absolute[0] if isinstance(value, str) else absolute
        return self.model_copy(update=named)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles: found {low} and {high}; expected 0 <= low < high <= 100")
        if (self.validation_images is None) != (self.validation_labels is None):
            raise ValueError("validation_images and validation_labels: only one of them is set; set both or neither")
        return self


class FullStrategy(_Frozen):
    """Everything learns: image encoder, prompt encoder and decoders."""

    kind: Literal["full"] = "full"


class FrozenStrategy(_Frozen):
    """The image encoder stays as it is; prompt encoder and decoders learn."""

    kind: Literal["frozen"] = "frozen"


_BLOCKS = "how many of the last blocks of the image encoder learn; what lies before them is computed once and kept"


class LateStrategy(_Frozen):
    """The last blocks of the image encoder learn, its neck, prompt encoder and decoders; earlier blocks stay."""

    kind: Literal["late"] = "late"
    blocks: PositiveInt = Field(3, description=_BLOCKS)


class LoraStrategy(_Frozen):
    """The image encoder stays, but for small low-rank matrices beside its weights; prompt encoder and decoders learn.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = Field(4, description="rank of the matrices: how much they can change")
    alpha: PositiveFloat | None = Field(
        None, description="the change is multiplied by alpha / rank; if unset, alpha is the rank, as in micro-sam"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of inputs to the matrices that is left out at random")
    targets: tuple[LoraTarget, ...] = Field(
        ("q", "v"),
        min_length=1,
        description="which weights get them: projections to queries, keys and values, the one behind attention "
        "('proj'), both of the perceptron ('mlp')",
    )
    quantize: bool = Field(
        False,
        description="keep the weights beside them in 4 bit (QLoRA); takes a CUDA card and the package bitsandbytes, "
        "saves under 0.3 GB for vit_b, more for vit_h, and rounds those weights",
    )


class LateLoraStrategy(LoraStrategy):
    """As ``lora``, in the last blocks alone."""

    kind: Literal["late_lora"] = "late_lora"  # type: ignore[assignment]
    blocks: PositiveInt = Field(3, description=_BLOCKS)


Strategy = Annotated[
    FullStrategy | FrozenStrategy | LateStrategy | LoraStrategy | LateLoraStrategy, Field(discriminator="kind")
]


class TrainingConfig(_Frozen):
    """How long and how the model learns."""

    epochs: PositiveInt = Field(100, description="at most this many epochs")
    samples_per_epoch: PositiveInt = Field(
        50, description="patches in an epoch; images are drawn again until there are this many"
    )
    patch_bank: PositiveInt | None = Field(
        None,
        description="draw so many patches, with their augmentation, and use them again and again; if unset, new ones "
        "in every epoch, or as many as samples_per_epoch where the feature cache is used",
    )
    batch_size: PositiveInt = Field(
        1,
        description="patches whose gradients are averaged for one optimizer step; they go through one by one, so more "
        "cost time, not memory (see resources.micro_batch)",
    )
    objects: PositiveInt | None = Field(
        None, description="objects per patch that the mask decoder learns from in one step; from the preset if unset"
    )
    input_px: int = Field(
        1024,
        ge=128,
        le=1024,
        multiple_of=64,
        description="side that a patch is resized to; half of it with half of data.patch_px keeps the scale of objects "
        "and costs a quarter, with less context around each",
    )
    positions: Positions = Field(
        "part",
        description="position encodings of a smaller input: 'part' those of a part of SAM's field of view (for vit_t "
        "anywhere in it, else its corner), for half a patch at the same scale; 'stretched' those of the whole field, "
        "for a whole patch at half the scale, which moves further from what the start model knows",
    )
    update: Update = Field(
        "together",
        description="'together' is one optimizer step for both decoders after one pass through the image encoder; "
        "'alternating' is micro-sam's two passes and two steps, for comparison",
    )
    sub_iterations: PositiveInt = Field(8, description="rounds of prompting per object and step")
    mask_prompt_probability: float = Field(0.5, ge=0, le=1, description="how often a round also gets the last mask")
    learning_rate: PositiveFloat = Field(1e-5, description="AdamW's learning rate at the start")
    plateau_factor: float = Field(0.9, gt=0, lt=1, description="the rate is multiplied by this on a plateau")
    plateau_patience: int = Field(3, ge=0, description="epochs without improvement before that")
    early_stopping: PositiveInt | None = Field(10, description="stop after this many epochs without improvement")
    minutes: PositiveFloat | None = Field(
        None,
        description="take no further step after so many minutes, earlier sessions and validations included; the epoch "
        "is cut short and validated, and the run ends as it does after its last epoch; how many steps it has then "
        "depends on the machine",
    )
    targets: Targets = Field(
        "both", description="which decoders learn: 'both', 'masks' (prompts) or 'instances' (automatic)"
    )
    batch_norm: Literal["keep", "measure"] = Field(
        "keep",
        description="statistics of vit_t's batch normalisation: 'keep' the start model's, or 'measure' them on the "
        "first patches before training, which random weights need; while training they stay as they are",
    )
    compare: bool = Field(
        True,
        description="at the end, compare the model with its start model on a few windows of held-out images, and say "
        "whether it is better",
    )
    report: bool = Field(True, description="at the end, write report.html into the run folder")
    seed: int = Field(0, ge=0, description="fixes split, patches, prompts and new weights")
    keep_every: PositiveInt | None = Field(None, description="also keep the checkpoint of every k-th epoch")
    save_minutes: PositiveFloat = Field(
        10, description="within an epoch, also save the checkpoint to resume from every so many minutes"
    )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last may have fewer patches."""
        return math.ceil(self.samples_per_epoch / self.batch_size)


class ResourcesConfig(_Frozen):
    """What the run may use."""

    preset: PresetName = Field(
        "auto", description="a named hardware preset: limits that training stays inside, and the number of objects"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where the model runs")
    precision: Precision = Field("auto", description="number format of the activations; 'auto' probes the device")
    memory_gb: PositiveFloat | None = Field(
        None, description="most RAM that training may take, loader processes included; the preset's if unset"
    )
    gpu_memory_gb: PositiveFloat | None = Field(
        None, description="most memory that training may take on the card; the preset's if unset"
    )
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads that training may take; if unset the preset's cores, as far as there "
        "are any, and no more than OMP_NUM_THREADS",
    )
    nice: int = Field(
        5,
        ge=0,
        le=19,
        description="how much training in a process of its own gives way to other programs, from 0 to 19",
    )
    levers: Literal["auto", "off"] = Field(
        "auto",
        description="'auto' switches on what saves memory, cheapest first, until the run fits its limit, and goes on "
        "with the next when memory runs out all the same; 'off' leaves the settings below as they are",
    )
    workers: int | None = Field(None, ge=0, description="processes that load patches; chosen for the machine if unset")
    micro_batch: PositiveInt = Field(
        1,
        description="patches of a step that go through the image encoder at once; faster on a large card, takes more "
        "memory, same result; always 1 with strategy.dropout",
    )
    object_chunk: PositiveInt | None = Field(
        None, description="objects sent through the mask decoder at once; changes memory, not the result"
    )
    checkpoint_encoder: bool = Field(
        False,
        description="keep only what enters each block of the image encoder and compute the rest twice; less memory, "
        "about a third more time in the encoder, same result",
    )
    checkpoint_instance_decoder: bool = Field(False, description="the same for the stages of the instance decoder")
    freed_memory: Literal["keep", "return"] = Field(
        "keep",
        description="on Linux, what becomes of freed RAM while training: 'keep' is up to a tenth faster, 'return' "
        "takes about 1 GB less for vit_b; same result",
    )
    feature_cache: Literal["auto", "off"] = Field(
        "auto",
        description="'auto' keeps on disk what frozen blocks of the image encoder compute for each patch, where the "
        "strategy has any, so that they run only once per patch; 'off' draws new patches and computes all of it in "
        "every epoch",
    )
    feature_cache_dir: Path | None = Field(
        None,
        description="a folder for it that several runs share, and that stays; if unset, one in the run folder, "
        "which is removed when the run has finished",
    )
    feature_cache_gb: PositiveFloat = Field(20, description="most room that it takes on disk")
    compile: bool = Field(
        False,
        description="run encoder and decoders through torch.compile; needs a C++ compiler on a CPU and minutes at the "
        "start; same result",
    )


class FinetuneConfig(_Frozen):
    """One finetuning run, whole.

    Read and written as YAML (`read_config`, `write_config`); keys are the same on the command line
    (``--set training.epochs=20``).
    """

    model: str = Field("vit_b_lm", description="a model name, or the path of a checkpoint or a run folder")
    output: Path | None = Field(None, description="the run folder; must not exist or be empty")
    data: DataConfig = DataConfig()
    strategy: Strategy = FullStrategy()
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()
