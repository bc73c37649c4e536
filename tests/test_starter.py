"""The start model that comes with the package: small, opens without network, and useful as it is."""

from __future__ import annotations

import numpy as np
import pytest

import napari_resfinetune as rf
from napari_resfinetune.data.synthetic import make_sample
from napari_resfinetune.models import load_model, load_state, resolve_model, save_model
from napari_resfinetune.models.names import starter_path

# Seeds that pretraining never drew: it takes 31-bit numbers from streams of its own.
UNSEEN = 2**31 + 7


def test_it_is_small_and_needs_no_code_to_open():
    path = starter_path()
    assert path.suffix == ".safetensors"
    assert path.stat().st_size <= 45e6


def test_it_is_found_by_name_with_its_decoder():
    location = resolve_model("starter")
    assert (location.name, location.architecture) == ("starter", "vit_t")
    model = load_model("starter", decoder="required")
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize(("modality", "least"), [("fluorescence_nuclei", 0.5), ("histology", 0.15)])
def test_it_segments_images_that_it_has_not_seen(modality, least):
    samples = [make_sample(modality, seed=UNSEEN + i, shape=(384, 384), field_px=768) for i in range(2)]
    scores = rf.evaluate([s.image for s in samples], [s.labels for s in samples], model="starter", device="cpu")
    assert scores.to_dict()["ais"]["sa50"] >= least


def test_it_becomes_a_micro_sam_checkpoint(tmp_path):
    model = load_model("starter", decoder="required")
    save_model(tmp_path / "starter.pt", model)
    weights = load_state(tmp_path / "starter.pt")
    assert weights.architecture == "vit_t" and weights.decoder_state is not None
    image = make_sample("fluorescence_nuclei", seed=UNSEEN, shape=(256, 256)).image
    again = rf.segment(image, model=tmp_path / "starter.pt", device="cpu")
    assert np.array_equal(again, rf.segment(image, model=model, device="cpu"))
