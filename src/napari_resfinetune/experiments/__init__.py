"""Floor 7: many runs, on one machine or a cluster, and their tables and figures."""

from napari_resfinetune.experiments.grid import GridConfig, make_grid, read_grid

__all__ = ["GridConfig", "make_grid", "read_grid"]
