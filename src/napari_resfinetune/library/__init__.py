"""Floor 6: the list of models that one has, and models as files for other tools. Listing loads no torch."""

from napari_resfinetune.library.export import export_model
from napari_resfinetune.library.models import (
    ModelEntry,
    delete_model,
    find_model,
    import_model,
    list_models,
    rename_model,
    set_note,
)

__all__ = [
    "ModelEntry",
    "delete_model",
    "export_model",
    "find_model",
    "import_model",
    "list_models",
    "rename_model",
    "set_note",
]
