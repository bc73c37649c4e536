"""Floor 5: how good a model is on labelled images."""

from napari_resfinetune.evaluation.evaluate import MODES, check_modes, evaluate_model
from napari_resfinetune.evaluation.rows import Evaluation, ImageScore, write_rows
from napari_resfinetune.evaluation.scores import mean_scores, score
from napari_resfinetune.evaluation.store import Store, evaluation_folder

__all__ = [
    "MODES",
    "Evaluation",
    "ImageScore",
    "Store",
    "check_modes",
    "evaluate_model",
    "evaluation_folder",
    "mean_scores",
    "score",
    "write_rows",
]
