"""Loaded models, each loaded once as long as there is room for it."""

from __future__ import annotations

from napari_resfinetune.models import SamModel, load_model
from napari_resfinetune.planning.memory import GB
from napari_resfinetune.search.candidates import Candidate
from napari_resfinetune.training.survival import free


class Shelf:
    """Keeps models in RAM; the one in use is on the device.

    Parameters
    ----------
    room_gb
        What those that are not in use may take.
    device
        Where models compute.
    """

    def __init__(self, room_gb: float, device: str) -> None:
        self.room_gb = room_gb
        self.device = device
        self._kept: dict[str, SamModel] = {}

    def get(self, candidate: Candidate) -> SamModel:
        """Return a model, in evaluation mode and on the device.

        Raises
        ------
        ModelError
            When it cannot be loaded.
        """
        model = self._kept.get(candidate.model)
        if model is None:
            model = load_model(candidate.location, decoder="optional")
            model.requires_grad_(False)
            taken_gb = sum(_size_gb(other) for other in self._kept.values())
            if taken_gb + _size_gb(model) <= self.room_gb:
                self._kept[candidate.model] = model
        if self.device != "cpu":
            for other in self._kept.values():
                if other is not model:
                    other.to("cpu")
        return model.to(self.device).eval()

    def drop(self, name: str) -> None:
        """Forget a model that is not needed any more."""
        self._kept.pop(name, None)

    def clear(self) -> None:
        """Forget all models, so that something else may take the memory."""
        self._kept.clear()
        free()


def _size_gb(model: SamModel) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / GB
