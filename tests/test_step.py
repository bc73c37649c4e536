"""The streamed training step gives micro-sam's gradients, for any way of computing it.

Whole steps are compared in float64, where only a real difference is left. In float32 the instance decoder's kinks turn
the last bit of an activation into 1e-3 of some gradients, also between two runs of micro-sam itself with other thread
counts, so there the prompted part alone is compared.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch_em
from micro_sam.instance_segmentation import DecoderAdapter, get_unetr
from micro_sam.training.sam_trainer import SamTrainer
from micro_sam.training.trainable_sam import TrainableSAM
from segment_anything.modeling import ImageEncoderViT

from napari_resfinetune.data.patches import Patch, instance_targets
from napari_resfinetune.models import SamModel
from napari_resfinetune.models.build import assemble_sam
from napari_resfinetune.models.encoder import compiled
from napari_resfinetune.models.tiny_vit import TinyViTEncoder
from napari_resfinetune.training import step as training_step
from napari_resfinetune.training.prompts import PromptPlan, Prompts, next_points, plan_training_prompts
from napari_resfinetune.training.step import Losses, StepSettings, backward_samples, validate_sample

PATCH_PX, INPUT_PX, ROUNDS = 40, 80, 3


class Doubled:
    """Stands in for torch in a module that names float32 outright."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def doubled(monkeypatch):
    """Let segment-anything's prompt encoder work in float64."""
    monkeypatch.setattr("segment_anything.modeling.prompt_encoder.torch", Doubled())


def small_vit(img_size: int) -> ImageEncoderViT:
    """Return SAM's encoder with three narrow blocks."""
    return ImageEncoderViT(
        img_size=img_size,
        embed_dim=64,
        depth=3,
        num_heads=4,
        out_chans=256,
        use_rel_pos=True,
        window_size=5,
        global_attn_indexes=(1,),
    )


def small_model(architecture: str, dtype: torch.dtype = torch.float32) -> tuple[SamModel, torch.nn.Module]:
    """Return a small model with random weights, and micro-sam's UNETR around the very same parameters."""
    torch.manual_seed(0)
    encoder: torch.nn.Module
    if architecture == "vit_t":
        encoder = TinyViTEncoder(img_size=INPUT_PX)
    else:
        encoder = small_vit(INPUT_PX)
    sam = assemble_sam(encoder)
    for name, parameter in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name or "attention_biases" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    unetr = get_unetr(sam.image_encoder, device="cpu")
    model = SamModel(sam, DecoderAdapter(unetr), architecture, "small")
    return model.to(dtype).train(), unetr.to(dtype).train()


def sample(objects: int = 4, dtype: torch.dtype = torch.float32) -> Patch:
    """Return a patch with discs."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:PATCH_PX, :PATCH_PX]
    labels = np.zeros((PATCH_PX, PATCH_PX), np.int64)
    for i in range(objects):
        cy, cx = 9 + 21 * (i // 2), 9 + 21 * (i % 2)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < 40 + 10 * i] = i + 1
    targets = instance_targets(labels, 25)
    assert targets is not None
    image = (labels > 0)[None] * 90 + rng.uniform(0, 120, (3, PATCH_PX, PATCH_PX))
    return Patch(
        torch.from_numpy(image).to(dtype),
        torch.from_numpy(targets[0].astype(np.int32)),
        torch.from_numpy(targets[1:]).to(dtype),
        0,
    )


def plan(patch: Patch, step: int, mask_probability: float = 0.5) -> PromptPlan:
    return plan_training_prompts(
        patch.labels,
        np.random.default_rng(2),
        step=step,
        objects=10,
        sub_iterations=ROUNDS,
        mask_prompt_probability=mask_probability,
    )


def upstream_gradients(
    model: SamModel, unetr: torch.nn.Module | None, patch: Patch, prompts: PromptPlan, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients as micro-sam's trainer computes them, with the prompts of a plan."""
    trainer: Any = object.__new__(SamTrainer)
    trainer.model = TrainableSAM(model.sam)
    trainer.loss = torch_em.loss.DiceLoss(reduce_channel=None)
    trainer.mse_loss = torch.nn.MSELoss()
    trainer.mask_prob, trainer.is_data_parallel = 0.5, False
    masks = iter([0.0 if use else 1.0 for use in prompts.mask_prompts])
    monkeypatch.setattr("random.random", lambda: next(masks))
    draws = iter(prompts.draws)

    def generate(true: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return *next_points(predicted[:, 0] > 0, true[:, 0] > 0, next(draws)), None, None

    trainer.prompt_generator = generate
    size = tuple(patch.labels.shape)
    inputs: dict[str, Any] = {"image": patch.image, "original_size": size}
    if prompts.first.points is not None:
        inputs["point_coords"] = trainer.model.transform.apply_coords_torch(prompts.first.points, size)
        inputs["point_labels"] = prompts.first.point_labels
    if prompts.first.boxes is not None:
        inputs["boxes"] = trainer.model.transform.apply_boxes_torch(prompts.first.boxes, size)
    model.zero_grad()
    interactive, *_ = trainer._compute_iterative_loss(
        [inputs], prompts.masks[None, :, None].to(patch.image.dtype), len(prompts.mask_prompts) + 1, prompts.multimask
    )
    loss = interactive
    if unetr is not None:
        instance_loss = torch_em.loss.DiceBasedDistanceLoss(mask_distances_in_bg=True)
        loss = loss + instance_loss(unetr(patch.image[None]), patch.targets[None])
    loss.backward()
    return loss.item(), gradients(model)


def backward_sample(model: SamModel, patch: Patch, prompts: PromptPlan | None, settings: Any, **options: Any) -> Losses:
    return backward_samples(model, [patch], [prompts], settings, **options)[0]


def gradients(model: SamModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Compare every parameter's gradient relative to its own norm, above the rounding of the whole."""
    used = {name for name, gradient in expected.items() if gradient.abs().max() > 0}
    assert used <= set(found)
    floor = tolerance / 1000 * max(float(gradient.norm()) for gradient in expected.values())
    for name in found:
        reference = expected.get(name, torch.zeros_like(found[name]))
        error = float((found[name] - reference).norm())
        assert error <= tolerance * float(reference.norm()) + floor, f"{name}: {error} of {float(reference.norm())}"


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
@pytest.mark.parametrize("step", [0, 1], ids=["points", "boxes"])
@pytest.mark.parametrize("mask_probability", [0.0, 1.0], ids=["no-masks", "masks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["whole", "prompted part"])
def test_gradients_are_those_of_micro_sam(architecture, step, mask_probability, dtype, monkeypatch, request):
    if dtype == torch.float64:
        request.getfixturevalue("doubled")
    model, unetr = small_model(architecture, dtype)
    whole = dtype == torch.float64
    patch = sample(dtype=dtype)
    prompts = plan(patch, step, mask_probability)
    loss, expected = upstream_gradients(model, unetr if whole else None, patch, prompts, monkeypatch)
    model.zero_grad()
    losses = backward_sample(model, patch, prompts, StepSettings(input_px=INPUT_PX), train_instances=whole)
    assert losses.total == pytest.approx(loss, rel=1e-6 if whole else 1e-5)
    assert_same(gradients(model), expected, tolerance=1e-6 if whole else 1e-5)


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize(
    "settings",
    [
        {"object_chunk": 1},
        {"object_chunk": 3},
        {"checkpoint_encoder": True, "checkpoint_instance_decoder": True},
        {"folded_attention": False},
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_the_gradients(architecture, settings):
    model, _ = small_model(architecture, torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patch = sample(dtype=torch.float64)
    plain = backward_sample(model, patch, plan(patch, 0), StepSettings(input_px=INPUT_PX), train_instances=True)
    expected, after = gradients(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.zero_grad()
    chosen = StepSettings(input_px=INPUT_PX, **settings)
    other = backward_sample(model, patch, plan(patch, 0), chosen, train_instances=True)
    assert other.total == pytest.approx(plain.total, rel=1e-9)
    assert_same(gradients(model), expected, tolerance=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, after[name], msg=name)


def test_a_frozen_encoder_gets_no_gradient_and_the_decoders_keep_theirs():
    model, _ = small_model("vit_b")
    patch = sample()
    backward_sample(model, patch, plan(patch, 0), StepSettings(input_px=INPUT_PX), train_instances=True)
    expected = {name: g for name, g in gradients(model).items() if "image_encoder" not in name}
    model, _ = small_model("vit_b")
    model.sam.image_encoder.requires_grad_(False)
    backward_sample(model, patch, plan(patch, 0), StepSettings(input_px=INPUT_PX), train_instances=True)
    assert_same(gradients(model), expected)


def test_the_weight_scales_gradients_and_samples_add_up():
    model, _ = small_model("vit_t")
    patch = sample()
    for step in (0, 1):
        backward_sample(model, patch, plan(patch, step), StepSettings(input_px=INPUT_PX), train_instances=False)
    whole = gradients(model)
    model.zero_grad()
    for step in (0, 1):
        backward_sample(
            model, patch, plan(patch, step), StepSettings(input_px=INPUT_PX), train_instances=False, weight=0.5
        )
    assert_same(gradients(model), {name: gradient / 2 for name, gradient in whole.items()})


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
@pytest.mark.usefixtures("doubled")
def test_a_micro_batch_gives_the_gradients_of_its_samples_one_by_one(architecture):
    model, _ = small_model(architecture, torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patches = [sample(3, torch.float64), sample(4, torch.float64)]
    plans = [plan(patch, 1) for patch in patches]
    settings = StepSettings(input_px=INPUT_PX)
    one_by_one = [
        backward_sample(model, patch, prompts, settings, train_instances=True)
        for patch, prompts in zip(patches, plans, strict=True)
    ]
    expected = gradients(model)
    model.load_state_dict(state)
    model.zero_grad()
    at_once = backward_samples(model, patches, plans, settings, train_instances=True)
    assert [losses.total for losses in at_once] == pytest.approx([losses.total for losses in one_by_one])
    assert_same(gradients(model), expected, tolerance=1e-9)


@pytest.mark.usefixtures("doubled")
def test_stretched_positions_are_those_of_a_sam_built_for_the_smaller_input():
    model, _ = small_model("vit_b", torch.float64)
    half = INPUT_PX // 2
    encoder = small_vit(half)
    smaller = SamModel(assemble_sam(encoder), model.instance_decoder, "vit_b", "smaller").to(torch.float64).train()
    resized = resize_rel_pos(smaller.state_dict(), model.state_dict())
    smaller.load_state_dict(resized)
    patch = sample(dtype=torch.float64)
    expected = backward_sample(smaller, patch, plan(patch, 1), StepSettings(input_px=half), train_instances=False)
    stretched = StepSettings(input_px=half, positions="stretched")
    found = backward_sample(model, patch, plan(patch, 1), stretched, train_instances=False)
    assert found.total == pytest.approx(expected.total, rel=1e-9)
    part = backward_sample(model, patch, plan(patch, 1), StepSettings(input_px=half), train_instances=False)
    assert part.total != pytest.approx(expected.total, rel=1e-6)


def resize_rel_pos(small: dict[str, torch.Tensor], large: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Interpolate the position tables of a model to those of one with a smaller field of view."""
    resized = {}
    for name, value in large.items():
        wanted = small[name].shape
        if value.shape == wanted:
            resized[name] = value
        elif "pos_embed" in name:
            grid = torch.nn.functional.interpolate(value.permute(0, 3, 1, 2), tuple(wanted[1:3]), mode="bilinear")
            resized[name] = grid.permute(0, 2, 3, 1)
        else:
            resized[name] = torch.nn.functional.interpolate(value.t()[None], wanted[0], mode="linear")[0].t()
    return resized


@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
def test_part_of_the_field_of_view_costs_a_part_and_still_trains(architecture):
    model, _ = small_model(architecture)
    patch = sample()
    small = Patch(patch.image[:, :24, :24], patch.labels[:24, :24], patch.targets[:, :24, :24], 0)
    losses = backward_sample(model, small, plan(small, 0), StepSettings(input_px=48), train_instances=True)
    assert losses.mask is not None and 0 < losses.mask < 1
    found = gradients(model)
    for part in ("image_encoder", "prompt_encoder", "mask_decoder", "instance_decoder"):
        assert any(part in name for name in found), part
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 0.0), (0.4, 1.0)])
@pytest.mark.parametrize("architecture", ["vit_b", "vit_t"])
def test_a_window_lies_where_it_was_put_with_its_prompts_unless_the_encoder_knows_places(
    architecture, place, monkeypatch
):
    """Of 5 x 5 cells the window has 3 x 3; a point amid a cell has the position of that cell."""
    model, _ = small_model(architecture)
    seen = {}

    def predict_masks(decoder, encoder, embedding, positions, sparse, **options):
        seen.update(positions=positions, sparse=sparse)
        return torch.zeros(1, 1, 12, 12), torch.zeros(1, 1)

    monkeypatch.setattr(training_step, "predict_masks", predict_masks)
    amid = torch.tensor([[[23.5, 39.5]]]) / 2  # column 1, row 2, in pixels of a patch of 24 px
    prompts = Prompts(amid, torch.ones(1, 1, dtype=torch.int), None)
    settings = StepSettings(input_px=48)
    training_step.predict_round(model, torch.zeros(1, 256, 3, 3), prompts, None, (24, 24), False, settings, place)
    encoder = model.sam.prompt_encoder
    row, column = (round(2 * share) if architecture == "vit_t" else 0 for share in place)
    assert torch.equal(seen["positions"], encoder.get_dense_pe()[..., row : row + 3, column : column + 3])
    position = seen["sparse"][0, 0] - encoder.point_embeddings[1].weight[0]
    torch.testing.assert_close(position, seen["positions"][0, :, 2, 1], atol=1e-4, rtol=0)


def test_compiled_parts_give_the_same_losses(monkeypatch):
    """Traced and differentiated ahead of time, but run without generated code, whose making takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled.cache_clear()
    model, _ = small_model("vit_b")
    patch = sample()
    plain = backward_sample(model, patch, plan(patch, 1), StepSettings(input_px=INPUT_PX), train_instances=True)
    expected = gradients(model)
    model.zero_grad()
    settings = StepSettings(input_px=INPUT_PX, compile=True)
    found = backward_sample(model, patch, plan(patch, 1), settings, train_instances=True)
    compiled.cache_clear()
    assert found.total == pytest.approx(plain.total, rel=1e-4)
    assert_same(gradients(model), expected, 1e-3)


def test_a_scaler_changes_no_gradient():
    model, _ = small_model("vit_t")
    patch = sample()
    settings = StepSettings(input_px=INPUT_PX)
    backward_sample(model, patch, plan(patch, 0), settings, train_instances=True)
    expected = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    backward_sample(model, patch, plan(patch, 0), settings, train_instances=True, scaler=scaler)
    scaler.unscale_(torch.optim.SGD(model.parameters()))
    assert_same(gradients(model), expected)


def test_bfloat16_is_close_to_float32():
    model, _ = small_model("vit_b")
    patch = sample()
    exact = backward_sample(model, patch, plan(patch, 1), StepSettings(input_px=INPUT_PX), train_instances=True)
    expected = gradients(model)
    largest = max(value.norm() for value in expected.values())
    model.zero_grad()
    half = StepSettings(input_px=INPUT_PX, autocast=torch.bfloat16)
    rough = backward_sample(model, patch, plan(patch, 1), half, train_instances=True)
    assert rough.total == pytest.approx(exact.total, rel=0.02)
    for name, value in expected.items():
        alike = torch.nn.functional.cosine_similarity(gradients(model)[name].flatten(), value.flatten(), dim=0)
        assert alike > 0.9 or value.norm() < 1e-3 * largest, name


def test_validation_leaves_the_model_alone():
    model, _ = small_model("vit_t")
    patch = sample()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = validate_sample(model.eval(), patch, plan(patch, 0), StepSettings(input_px=INPUT_PX), with_instances=True)
    assert losses.mask is not None and losses.instance is not None
    assert gradients(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
