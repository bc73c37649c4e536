"""Floor 5, above evaluation: what a run came to, as one page to read, print and pass on."""

from napari_resfinetune.reporting.page import write_report

__all__ = ["write_report"]
