"""Which parts of a model learn."""

from __future__ import annotations

from dataclasses import dataclass

from napari_resfinetune.config import FrozenStrategy, FullStrategy
from napari_resfinetune.config.schema import Targets
from napari_resfinetune.errors import ModelError
from napari_resfinetune.models.build import SamModel, parts


@dataclass(frozen=True)
class TrainableReport:
    """How much of a model learns.

    Attributes
    ----------
    trainable
        Parameters that learn, by part.
    total
        All parameters, by part.
    share
        Those that learn over all, from 0 to 1.
    """

    trainable: dict[str, int]
    total: dict[str, int]
    share: float


def apply_strategy(model: SamModel, strategy: FullStrategy | FrozenStrategy, targets: Targets) -> TrainableReport:
    """Set which parameters learn (`requires_grad`), for every parameter of the model.

    The classification head that ``vit_t`` carries for other tools never learns, as nothing uses it.

    Parameters
    ----------
    model
        The model; its weights and mode are left as they are.
    strategy
        ``full``: the image encoder learns too; ``frozen``: it does not.
    targets
        ``"masks"``: prompt encoder and mask decoder; ``"instances"``: the instance decoder; ``"both"``.

    Raises
    ------
    ModelError
        When `targets` need an instance decoder and the model has none.
    """
    if targets != "masks" and model.instance_decoder is None:
        raise ModelError(
            f"{model.name}: no instance decoder, which training.targets '{targets}' trains; load the model with a new "
            "decoder or set training.targets to 'masks'"
        )
    learns = {
        "image_encoder": strategy.kind == "full",
        "prompt_encoder": targets != "instances",
        "mask_decoder": targets != "instances",
        "instance_decoder": targets != "masks",
    }
    for name, part in parts(model).items():
        part.requires_grad_(learns[name])
    if model.architecture == "vit_t":
        model.sam.image_encoder.head.requires_grad_(False)
    return count_parameters(model)


def count_parameters(model: SamModel) -> TrainableReport:
    """Count what learns in a model as it is now."""
    trainable = {
        name: sum(tensor.numel() for tensor in part.parameters() if tensor.requires_grad)
        for name, part in parts(model).items()
    }
    total = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in parts(model).items()}
    return TrainableReport(trainable, total, sum(trainable.values()) / sum(total.values()))
