"""What a training run works on."""

from __future__ import annotations

from dataclasses import dataclass

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.data.patches import TrainingPatches, ValidationPatches
from napari_resfinetune.models import SamModel
from napari_resfinetune.planning.levers import Work
from napari_resfinetune.training.run_folder import RunFolder

SAM_INPUT_PX = 1024


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a training run works on.

    Attributes
    ----------
    config
        What was asked.
    run
        Where results go.
    model
        On its device, with `requires_grad` set by the strategy.
    training, validation
        Patches.
    work
        How a step is computed, as far as memory and time depend on it.
    use_scaler
        Whether losses are scaled (float16).
    base_is_lasting
        Whether an adapter can be put onto the start model again; fresh random weights are gone after the run.
    memory_limit_gb
        What may be taken of the memory that decides; `None` is all there is.
    foreign_gb
        What of this process's RAM belongs to others than training.
    """

    config: FinetuneConfig
    run: RunFolder
    model: SamModel
    training: TrainingPatches
    validation: ValidationPatches
    work: Work
    use_scaler: bool = False
    base_is_lasting: bool = True
    memory_limit_gb: float | None = None
    foreign_gb: float = 0.0

    @property
    def inference_patch_px(self) -> int:
        """Side of the patch that has the training's scale of objects when it fills SAM's whole input, in image px."""
        return self.config.data.patch_px * SAM_INPUT_PX // self.config.training.input_px
