"""Floor 5: how good a model is on labelled images."""

from napari_resfinetune.evaluation.evaluate import MODES, Evaluation, ImageScore, check_modes, evaluate_model
from napari_resfinetune.evaluation.scores import mean_scores, score

__all__ = ["MODES", "Evaluation", "ImageScore", "check_modes", "evaluate_model", "mean_scores", "score"]
