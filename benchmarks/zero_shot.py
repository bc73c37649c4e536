"""Scores of models on labelled images as they are, without finetuning, modality by modality.

    python benchmarks/zero_shot.py --data FOLDER --models starter vit_b_lm --modes ais box point

`--data` holds one folder per modality, each with `images` and `labels`. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import napari_resfinetune as rf


def main() -> None:
    """Evaluate every model on every modality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["starter"])
    parser.add_argument("--modes", nargs="+", default=["ais", "box"])
    parser.add_argument("--modalities", nargs="+", help="folders to look at; all by default")
    options = parser.parse_args()
    columns = [f"{mode} {score}" for mode in options.modes for score in ("SA50", "mSA")]
    print("| model | modality | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|", flush=True)
    for name in options.models:
        model = rf.load_model(name, decoder="required")
        for folder in sorted(path for path in options.data.iterdir() if (path / "images").is_dir()):
            if options.modalities and folder.name not in options.modalities:
                continue
            scores = rf.evaluate(folder / "images", folder / "labels", model=model, modes=options.modes).to_dict()
            cells = [f"{scores[mode][score]:.2f}" for mode in options.modes for score in ("sa50", "msa")]
            print(f"| {name} | {folder.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
