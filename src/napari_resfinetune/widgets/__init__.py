"""Dock widgets for napari: the only place with Qt, napari and magicgui. Nothing here imports torch."""
