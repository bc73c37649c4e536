"""Be the engine."""

from napari_resfinetune.engine.process import main

if __name__ == "__main__":
    main()
