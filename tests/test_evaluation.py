"""Evaluation of a model whose right answers are known."""

from __future__ import annotations

import csv
import functools

import numpy as np
import pytest
import torch
from torch import nn

import napari_resfinetune as rf
from napari_resfinetune.data.pairs import find_pairs
from napari_resfinetune.data.synthetic import make_sample
from napari_resfinetune.errors import ConfigError, DataError, ModelError
from napari_resfinetune.evaluation import Store, check_modes, evaluate_model, write_rows
from napari_resfinetune.evaluation.prompted import prompts_from_labels, segment_prompted
from napari_resfinetune.inference.tiling import embed_plane, set_embedding
from napari_resfinetune.models import load_model, upstream
from see_through import INPUT_PX, disks, paint, see_through_model

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


class PointsEncoder(nn.Module):
    """Hands all points on, with their labels."""

    def get_dense_pe(self) -> torch.Tensor:
        return torch.zeros(1)

    def forward(self, points, boxes, masks):
        coords, labels = points
        return torch.cat([coords, labels[..., None].float()], -1), torch.zeros(1)


class BrushDecoder(nn.Module):
    """Fills a square around every point inside an object and clears one around every point outside, in their order."""

    def __init__(self, brush_px: float) -> None:
        super().__init__()
        self.brush_px = brush_px

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        at = (torch.arange(INPUT_PX // 4) + 0.5) * 4
        masks = torch.full((len(sparse_prompt_embeddings), 1, len(at), len(at)), -20.0)
        for mask, prompts in zip(masks, sparse_prompt_embeddings, strict=True):
            for x, y, inside in prompts:
                rows, columns = ((at - centre).abs() < self.brush_px for centre in (y, x))
                mask[0][rows[:, None] & columns[None]] = 20.0 if inside else -20.0
        count = 3 if multimask_output else 1
        return masks.repeat(1, count, 1, 1), torch.full((len(masks), count), 0.9)


def test_each_round_of_iterative_prompting_corrects_the_one_before() -> None:
    labels = np.zeros((128, 128), np.int32)
    labels[10:30, 10:118], labels[60:80, 10:118] = 1, 2
    model = see_through_model()
    model.sam.prompt_encoder, model.sam.mask_decoder = PointsEncoder(), BrushDecoder(80)  # 10 px of the image
    pairs = find_pairs([paint(labels)], [labels])
    found = evaluate_model(model, pairs, modes=("point", "iterative_point"), percentiles=EXACT, patch_px=128)
    rounds = [row for row in found.rows if row.mode == "iterative_point"]
    assert [row.round for row in rounds] == list(range(1, 9))
    assert rounds[0].sa50 == found.rows[0].sa50 == 0
    assert rounds[-1].dice > rounds[3].dice > rounds[0].dice
    assert rounds[-1].recall == 1
    assert found.to_dict()["iterative_point"]["sa50"] == rounds[-1].sa50
    assert [means["sa50"] for means in found.summary()["iterative_point"]["rounds"]] == [row.sa50 for row in rounds]
    again = evaluate_model(model, pairs, modes=("iterative_point",), percentiles=EXACT, patch_px=128)
    assert list(again.rows) == rounds


@pytest.mark.parametrize("mode", ["box", "point"])
def test_prompts_give_the_masks_of_sams_own_predictor(mode) -> None:
    sample = make_sample("crowded_cytoplasm", seed=3, shape=(160, 128))
    labels = np.where(sample.labels <= 4, sample.labels, 0)
    model = load_model("starter").eval()
    image = np.repeat(sample.image[..., None] / sample.image.max() * 255, 3, axis=-1).astype(np.float32)
    (embedding,) = embed_plane(model, image, patch_px=160)
    (found,) = segment_prompted(model, labels, [embedding], mode)
    prompts = prompts_from_labels(labels)
    predictor = upstream.SamPredictor(model.sam)
    set_embedding(predictor, embedding)
    expected, best = np.zeros(labels.shape, int), np.full(labels.shape, -np.inf)
    for number, point, box in zip(prompts.ids, prompts.points, prompts.boxes, strict=True):
        given = {"box": box} if mode == "box" else {"point_coords": point[None], "point_labels": np.ones(1)}
        masks, quality, _ = predictor.predict(**given, multimask_output=mode == "point")
        better = masks[quality.argmax()] & (quality.max() > best)
        expected[better], best[better] = number, quality.max()
    assert len(prompts.ids) > 1 and found.any()
    assert (found != expected).mean() < 1e-3


def test_boxes_of_the_first_round_are_those_of_mode_box() -> None:
    labels = squares((90, 120))
    pairs = find_pairs([paint(labels)], [labels])
    model = see_through_model()
    model.sam.prompt_encoder.forward = functools.partial(_boxes_alone, model.sam.prompt_encoder.forward)
    found = evaluate_model(model, pairs, modes=("box", "iterative_box"), percentiles=EXACT, patch_px=128)
    assert len(found.rows) == 9
    assert {(row.sa50, row.msa) for row in found.rows} == {(found.rows[0].sa50, found.rows[0].msa)}


def _boxes_alone(forward, points, boxes, masks):
    assert boxes is not None
    return forward(points=None, boxes=boxes, masks=masks)


def cylinders() -> tuple[np.ndarray, np.ndarray]:
    """Return a stack "ZYXC" and labels "ZYX" with objects that reach over several slices, and an empty one below."""
    labels = np.zeros((5, 100, 100), np.int32)
    labels[1:4] = disks((100, 100))
    labels[3][labels[3] == 1] = 0
    empty = np.full((100, 100, 3), 255, np.float32)
    return np.stack([paint(plane) if plane.any() else empty for plane in labels]), labels


def test_a_stack_as_one_volume_and_slice_by_slice() -> None:
    stack, labels = cylinders()
    stack[0], stack[4] = stack[1], stack[1]  # outside of what is annotated nothing counts
    pairs = find_pairs([stack], [labels], axes="ZYXC")
    how = {"modes": ("ais", "box"), "percentiles": EXACT, "patch_px": 128}
    whole = evaluate_model(see_through_model(), pairs, volumes=True, **how)
    assert [(row.plane, row.slices, row.n_true, row.n_pred) for row in whole.rows] == [(None, 3, 4, 4)] * 2
    assert all(row.sa50 == 1 for row in whole.rows)
    slices = evaluate_model(see_through_model(), pairs, **how)
    assert [(row.plane, row.n_true) for row in slices.rows if row.mode == "ais"] == [(1, 4), (2, 4), (3, 3)]


def test_what_was_evaluated_is_kept_by_what_it_came_from(tmp_path) -> None:
    labels = disks((100, 100))
    images = [paint(labels)]
    how = {"percentiles": EXACT, "patch_px": 128}

    def evaluate(model, labels, *modes):
        store = Store(tmp_path, model, patch_px=128, precision=None)
        before = len(model.sam.image_encoder.calls)
        found = evaluate_model(model, find_pairs(images, [labels]), modes=modes, store=store, **how)
        return found, len(model.sam.image_encoder.calls) - before, store.misses

    model = see_through_model()
    first, encoded, missed = evaluate(model, labels, "ais", "box")
    assert (encoded, missed) == (1, 2)
    assert first == evaluate_model(model, find_pairs(images, [labels]), modes=("ais", "box"), **how)
    assert evaluate(see_through_model(), labels, "ais", "box") == (first, 0, 0)
    # Another mode or other labels need no encoder; other weights do.
    assert evaluate(model, labels, "point", "ais")[1:] == (0, 1)
    fewer = np.where(labels == 1, 0, labels)
    changed, encoded, missed = evaluate(model, fewer, "ais")
    assert (encoded, missed) == (0, 1)
    assert changed.rows[0].n_true == first.rows[0].n_true - 1
    other = see_through_model()
    other.sam.image_encoder.register_buffer("weight", torch.ones(1))
    assert evaluate(other, labels, "ais")[1:] == (1, 1)
    # What is damaged is made again.
    for file in (tmp_path / "scores").rglob("*.json"):
        file.write_text('{"torn', encoding="utf-8")
    assert evaluate(model, labels, "ais", "box")[0] == first


def test_summary_of_images() -> None:
    labels = disks((100, 100))
    half = np.where(labels % 2, labels, 0)  # every second object is not painted, so it is missed
    found = evaluate_model(
        see_through_model(),
        find_pairs([paint(labels), paint(half)], [labels, labels]),
        percentiles=EXACT,
        patch_px=128,
    )
    summary = found.summary()["ais"]
    count, missed = int(labels.max()), int(labels.max() - np.count_nonzero(np.unique(half)))
    assert summary["means"]["recall"] == pytest.approx(1 - missed / count / 2)
    counts = {"n_true": 2 * count, "n_pred": 2 * count - missed, "missed": missed, "extra": 0, "merged": 0, "split": 0}
    assert summary["counts"] == counts
    low, high = summary["intervals"]["recall"]
    assert low == pytest.approx(1 - missed / count) and high == 1
    assert sum(size["n_true"] for size in summary["sizes"]) == 2 * count
    assert sum(size["found"] for size in summary["sizes"]) == 2 * count - missed


def test_several_models_side_by_side(tmp_path) -> None:
    labels = disks((100, 100))
    models = [see_through_model(point_px=96), see_through_model(point_px=5)]
    models[1].name = "small brush"
    # Scores are kept by weights, and what a test's model does is no weight.
    models[1].sam.register_buffer("weight", torch.ones(1))
    found = rf.evaluate([paint(labels)], [labels], model=models, modes=("point",), cache=tmp_path, patch_px=128)
    assert list(found) == ["see-through", "small brush"]
    assert found["see-through"].to_dict()["point"]["sa50"] == 1
    assert found["small brush"].to_dict()["point"]["sa50"] == 0
    one = rf.evaluate([paint(labels)], [labels], model=models[0], modes=("point",), cache=False, patch_px=128)
    assert one.to_dict() == found["see-through"].to_dict()
    write_rows(tmp_path / "rows.csv", found)
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], float(row["sa50"])) for row in rows] == [("see-through", 1), ("small brush", 0)]
    with pytest.raises(ConfigError, match="empty"):
        rf.evaluate([paint(labels)], [labels], model=[])
