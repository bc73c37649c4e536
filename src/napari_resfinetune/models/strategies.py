"""Which parts of a model learn."""

from __future__ import annotations

from dataclasses import dataclass

from napari_resfinetune.config import (
    FrozenStrategy,
    FullStrategy,
    LateLoraStrategy,
    LateStrategy,
    LoraStrategy,
    Strategy,
)
from napari_resfinetune.config.schema import Targets
from napari_resfinetune.errors import ConfigError, ModelError
from napari_resfinetune.models.build import Lora, SamModel, parts
from napari_resfinetune.models.encoder import encoder_units
from napari_resfinetune.models.lora import add_lora
from napari_resfinetune.models.weights import weights_hash


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

    def __str__(self) -> str:
        """Say it, as in ``image encoder 0.1 of 89.7 M, mask decoder 4.1 M; 4.2 M parameters, 4.0% of the model``."""
        parts = []
        for name, count in self.trainable.items():
            whole = "" if count == self.total[name] else f" of {_millions(self.total[name])}"
            if count:
                parts.append(f"{name.replace('_', ' ')} {_millions(count)}{whole} M")
        count = sum(self.trainable.values())
        return f"{', '.join(parts)}; {_millions(count)} M parameters, {self.share:.1%} of the model"


def apply_strategy(model: SamModel, strategy: Strategy, targets: Targets) -> TrainableReport:
    """Set which parameters learn (`requires_grad`), for every parameter of the model; LoRA also adds its matrices.

    The classification head that ``vit_t`` carries for other tools never learns, as nothing uses it.

    Parameters
    ----------
    model
        The model; its weights and mode are left as they are. Adapters that it has are merged.
    strategy
        Decides about the image encoder.
    targets
        ``"masks"``: prompt encoder and mask decoder; ``"instances"``: the instance decoder; ``"both"``.

    Raises
    ------
    ConfigError
        When there are not so many blocks.
    ModelError
        When `targets` need an instance decoder and the model has none.
    ResourceError
        When LoRA shall have 4-bit weights where they cannot be had.
    """
    if targets != "masks" and model.instance_decoder is None:
        raise ModelError(
            f"{model.name}: no instance decoder, which training.targets '{targets}' trains; load the model with a new "
            "decoder or set training.targets to 'masks'"
        )
    learns = {
        "image_encoder": False,
        "prompt_encoder": targets != "instances",
        "mask_decoder": targets != "instances",
        "instance_decoder": targets != "masks",
    }
    model.merge_adapters()
    for name, part in parts(model).items():
        part.requires_grad_(learns[name])
    _let_encoder_learn(model, strategy)
    return count_parameters(model)


def _let_encoder_learn(model: SamModel, strategy: Strategy) -> None:
    units = encoder_units(model.sam.image_encoder)
    blocks = [i for i, unit in enumerate(units) if unit.is_block]
    if isinstance(strategy, LateStrategy | LateLoraStrategy):
        if strategy.blocks > len(blocks):
            raise ConfigError(
                f"strategy.blocks: {strategy.blocks} blocks shall learn, but the image encoder of {model.architecture} "
                f"has {len(blocks)}; choose fewer, or strategy full or lora"
            )
        blocks = blocks[-strategy.blocks :]
    if isinstance(strategy, LoraStrategy):
        model.lora = Lora(strategy, encoder_hash(model))
        add_lora(model.sam.image_encoder, [units[i].parts[0] for i in blocks], strategy)
    elif not isinstance(strategy, FrozenStrategy):
        first = 0 if isinstance(strategy, FullStrategy) else blocks[0]
        for unit in units[first:]:
            for parameter in unit.parameters():
                parameter.requires_grad_(True)


def encoder_hash(model: SamModel) -> str:
    """Return the sha256 of the image encoder's weights as they are now."""
    return weights_hash(model.sam.image_encoder.state_dict())


def count_parameters(model: SamModel) -> TrainableReport:
    """Count what learns in a model as it is now."""
    trainable = {
        name: sum(tensor.numel() for tensor in part.parameters() if tensor.requires_grad)
        for name, part in parts(model).items()
    }
    total = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in parts(model).items()}
    return TrainableReport(trainable, total, sum(trainable.values()) / sum(total.values()))


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 5e4 else f"{count / 1e6:.3f}"
