"""The dock widget "Finetune": images, model, computer, run."""

from napari_resfinetune.widgets.finetune.widget import FinetuneWidget

__all__ = ["FinetuneWidget"]
