"""Evaluation of a model whose right answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from napari_resfinetune.data.pairs import find_pairs
from napari_resfinetune.errors import ConfigError, DataError, ModelError
from napari_resfinetune.evaluation import check_modes, evaluate_model
from see_through import disks, paint, see_through_model

EXACT = (0.0, 100.0)


def squares(shape: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(shape, np.int32)
    for number, (y, x) in enumerate(np.ndindex(shape[0] // 40, shape[1] // 40), 1):
        labels[40 * y + 10 : 40 * y + 30, 40 * x + 10 : 40 * x + 30] = number
    return labels


@pytest.mark.parametrize("shape", [(90, 120), (170, 185), (200, 230)])
def test_all_modes_are_right_padded_whole_and_cut(shape: tuple[int, int]) -> None:
    labels = squares(shape)
    patch = 128
    # 20 px squares around points, in pixels of the model's input.
    factor = 1024 / patch if max(shape) < patch or max(shape) > 1.5 * patch else 1024 / max(shape)
    model = see_through_model(point_px=10 * factor)
    pairs = find_pairs([paint(labels)], [labels])
    found = evaluate_model(model, pairs, modes=("ais", "box", "point"), percentiles=EXACT, patch_px=patch)
    assert [row.mode for row in found.rows] == ["ais", "box", "point"]
    assert {row.n_true for row in found.rows} == {row.n_pred for row in found.rows} == {int(labels.max())}
    means = found.to_dict()
    assert set(means["box"]) == {"sa50", "sa75", "msa"}
    assert means["ais"]["sa50"] == 1
    assert means["box"]["msa"] > 0.85
    assert means["point"]["sa75"] == 1


def test_encoder_runs_once_per_image_for_all_modes() -> None:
    labels = disks((100, 100))
    model = see_through_model()
    told = []
    found = evaluate_model(
        model,
        find_pairs([paint(labels)] * 3, [labels] * 3),
        modes=("box", "ais", "point", "box"),
        percentiles=EXACT,
        patch_px=128,
        max_images=2,
        on_progress=lambda *args: told.append(args),
    )
    assert len(model.sam.image_encoder.calls) == 2
    assert [done for done, _, _ in told] == [0, 1] and {total for _, total, _ in told} == {2}
    assert len(found.rows) == 6
    assert list(found.to_dict()) == ["box", "ais", "point"]


def test_only_annotated_slices_count() -> None:
    labels = np.zeros((4, 100, 100), np.int32)
    labels[2] = disks((100, 100))
    stack = np.stack([paint(plane)[..., 1] for plane in labels])
    found = evaluate_model(see_through_model(), find_pairs([stack], [labels]), modes=("box",), patch_px=128)
    assert [(row.plane, row.n_true) for row in found.rows] == [(2, int(labels.max()))]


def test_errors_say_what_to_do() -> None:
    labels = disks((64, 64))
    pairs = find_pairs([paint(labels)], [labels])
    with pytest.raises(ConfigError, match="boxes"):
        check_modes(("ais", "boxes"))
    with pytest.raises(ConfigError, match="list"):
        check_modes("ais")
    with pytest.raises(ModelError, match="instance decoder"):
        evaluate_model(see_through_model(decoder=False), pairs)
    with pytest.raises(DataError, match="no image has a labelled object"):
        evaluate_model(see_through_model(), find_pairs([paint(labels)], [labels * 0]), patch_px=128)
