"""``python -m napari_resfinetune.cli`` is the command, where a launcher such as torchrun wants a module."""

from napari_resfinetune.cli import main

if __name__ == "__main__":
    main()
