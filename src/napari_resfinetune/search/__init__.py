"""Floor 6: which start model fits these images, before any training."""

from napari_resfinetune.search.candidates import Candidate, Download, LeftOut, find_candidates
from napari_resfinetune.search.results import Suggestion, Suggestions
from napari_resfinetune.search.run import SearchOptions, suggest

__all__ = [
    "Candidate",
    "Download",
    "LeftOut",
    "SearchOptions",
    "Suggestion",
    "Suggestions",
    "find_candidates",
    "suggest",
]
