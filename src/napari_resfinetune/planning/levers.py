"""What a step's memory and time depend on, and the levers that make it smaller, cheapest first.

The planner pulls them before a run, until its prediction fits; the trainer pulls them while it runs, when memory ran
out all the same. Both go through the same list; the trainer returns freed memory before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from napari_resfinetune.config import FinetuneConfig, FullStrategy, Strategy
from napari_resfinetune.config.schema import Positions, Targets, Update
from napari_resfinetune.planning.allocator import can_be_returned


@dataclass(frozen=True)
class Work:
    """One training step, as far as its memory and time depend on it. Names are those of the configuration.

    Attributes
    ----------
    architecture
        ``"vit_t"``, ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``.
    device
        Its kind: ``"cpu"``, ``"cuda"`` or ``"mps"``.
    precision
        ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    keep_features
        Whether what frozen blocks compute is kept on disk.
    workers
        Processes that load patches.
    """

    architecture: str
    strategy: Strategy = field(default_factory=FullStrategy)
    targets: Targets = "both"
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    patch_px: int = 512
    input_px: int = 1024
    positions: Positions = "part"
    update: Update = "together"
    objects: int = 10
    sub_iterations: int = 8
    batch_size: int = 1
    micro_batch: int = 1
    object_chunk: int | None = None
    checkpoint_encoder: bool = False
    checkpoint_instance_decoder: bool = False
    freed_memory: Literal["keep", "return"] = "keep"
    compile: bool = False
    keep_features: bool = False
    workers: int = 0

    @property
    def encoder_learns(self) -> bool:
        """Whether a gradient goes into the image encoder."""
        return self.strategy.kind != "frozen"


@dataclass(frozen=True)
class Pulled:
    """A lever that was pulled.

    Attributes
    ----------
    lever
        The key of the configuration that it sets, as ``"resources.object_chunk"``.
    before, after
        Its value.
    effect
        What it does, in words.
    changes_training
        Whether the result becomes another one, beyond rounding.
    """

    lever: str
    before: Any
    after: Any
    effect: str
    changes_training: bool = False

    def __str__(self) -> str:
        """Say it, as ``resources.object_chunk=5 (was 10): fewer objects at once``."""
        return f"{self.lever}={_say(self.after)} (was {_say(self.before)}): {self.effect}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Lever:
    key: str
    smaller: Callable[[Work], Any]  # the next value, or the present one when there is none
    effect: str
    section: str = "resources"
    changes_training: bool = False


def _half(value: int) -> int:
    return max(1, value // 2)


def _checkpointed_encoder(work: Work) -> bool:
    return work.checkpoint_encoder or work.encoder_learns


def _checkpointed_decoder(work: Work) -> bool:
    return work.checkpoint_instance_decoder or work.targets != "masks"


def _smaller_chunk(work: Work) -> int | None:
    if work.targets == "instances" or work.objects == 1:
        return work.object_chunk
    return _half(min(work.object_chunk or work.objects, work.objects))


def _fewer_workers(work: Work) -> int:
    return work.workers // 2 if work.device == "cpu" else work.workers  # they take no memory of a card


def _fewer_objects(work: Work) -> int:
    return work.objects if work.targets == "instances" else _half(work.objects)


_LEVERS: Sequence[_Lever] = (
    _Lever("micro_batch", lambda work: _half(work.micro_batch), "fewer patches at once; slower on a card"),
    _Lever(
        "checkpoint_instance_decoder",
        _checkpointed_decoder,
        "what the instance decoder computes is computed twice instead of kept",
    ),
    _Lever(
        "checkpoint_encoder",
        _checkpointed_encoder,
        "what the image encoder computes is computed twice instead of kept; a sixth slower",
    ),
    _Lever(
        "freed_memory",
        lambda work: "return" if work.device == "cpu" and can_be_returned() else work.freed_memory,
        "freed memory goes back to the system at once; a tenth slower",
    ),
    _Lever("object_chunk", _smaller_chunk, "fewer objects go through the mask decoder at once"),
    _Lever("workers", _fewer_workers, "fewer processes load patches"),
)
_LAST_RESORTS: Sequence[_Lever] = (
    _Lever(
        "objects",
        _fewer_objects,
        "fewer objects per step are learned from, which changes training",
        section="training",
        changes_training=True,
    ),
)


def pull_lever(work: Work, *, ran_out: bool = False) -> tuple[Work, Pulled] | None:
    """Make the work smaller by the next lever.

    Parameters
    ----------
    work
        As it is.
    ran_out
        Memory ran out. The holes of a heap are then of no use any more, so freed memory is returned first; and at last
        comes what changes the result.

    Returns
    -------
    work, pulled
        The smaller work and what was changed; `None` when nothing is left.
    """
    row = (*(lever for lever in _LEVERS if lever.key == "freed_memory"), *_LEVERS, *_LAST_RESORTS)
    for lever in row if ran_out else _LEVERS:
        before, after = getattr(work, lever.key), lever.smaller(work)
        if after != before:
            smaller = replace(work, **{lever.key: after})
            name = f"{lever.section}.{lever.key}"
            return smaller, Pulled(name, before, after, lever.effect, lever.changes_training)
    return None


def at_most(work: Work, levers: Mapping[str, Any]) -> Work:
    """Return the work with levers that were pulled in an earlier session, and no larger than it is."""
    smaller: dict[str, Any] = {}
    for key, value in levers.items():
        own = getattr(work, key)
        if isinstance(value, bool) or not isinstance(value, int):
            smaller[key] = value
        else:
            smaller[key] = value if own is None else min(value, own)
    return replace(work, **smaller)


def levered(config: FinetuneConfig, pulled: Sequence[Pulled]) -> FinetuneConfig:
    """Return the configuration with what the levers have set."""
    for each in pulled:
        section, _, key = each.lever.partition(".")
        changed = getattr(config, section).model_copy(update={key: each.after})
        config = config.model_copy(update={section: changed})
    return config


def _say(value: Any) -> str:
    if value is None:
        return "all"
    return str(value).lower() if isinstance(value, bool) else str(value)
