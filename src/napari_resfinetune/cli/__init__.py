"""Floor 8: the command ``resfinetune``, one verb per call of the API."""


def main() -> None:
    """Run the command."""
    from napari_resfinetune.cli.app import app

    app()


__all__ = ["main"]
