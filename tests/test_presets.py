"""Presets: their limits and defaults, which of them fit a machine, and which one is chosen."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import get_args

import pytest

from napari_resfinetune.config.schema import PresetName
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.models.names import known_model
from napari_resfinetune.planning import PRESETS, Gpu, Hardware, auto_preset, get_preset, preset_fits

CARDS = {
    "GTX 1080": ((6, 1), 8.5),
    "V100": ((7, 0), 34.0),
    "RTX 5000": ((7, 5), 16.9),
    "RTX 3090": ((8, 6), 25.3),
    "A100": ((8, 0), 85.0),
    "H200": ((9, 0), 149.0),
}


def card(name: str, index: int = 0, free_gb: float | None = None, **changes: object) -> Gpu:
    capability, total_gb = CARDS[name]
    return Gpu(index, name, total_gb, total_gb - 0.4 if free_gb is None else free_gb, capability, **changes)


def machine(*gpus: Gpu, free_gb: float = 28.0, total_gb: float = 68.0, **changes: object) -> Hardware:
    return Hardware("a CPU", 8, 16, total_gb, free_gb, gpus=gpus, **changes)


def test_every_name_of_the_config_has_a_preset():
    assert set(PRESETS) == set(get_args(PresetName)) - {"auto"}
    assert all(get_preset(name).name == name for name in PRESETS)


@pytest.mark.parametrize(
    ("name", "memory_gb", "gpu_memory_gb", "cores"),
    [
        ("cpu-8gb", 8, None, 8),
        ("cpu-16gb", 16, None, 8),
        ("cpu-32gb", 32, None, 16),
        ("cpu-64gb", 64, None, 16),
        ("gtx1080", 32, 8, 8),
        ("rtx5000", 32, 16, 8),
        ("v100", 32, 32, 8),
    ],
)
def test_limits_as_published(name, memory_gb, gpu_memory_gb, cores):
    preset = get_preset(name)
    assert (preset.memory_gb, preset.gpu_memory_gb, preset.cores) == (memory_gb, gpu_memory_gb, cores)


@pytest.mark.parametrize(
    ("name", "architecture", "objects"),
    [
        ("cpu-8gb", "vit_t", 1),
        ("cpu-16gb", "vit_t", 5),
        ("cpu-32gb", "vit_b", 10),
        ("cpu-64gb", "vit_b", 15),
        ("gtx1080", "vit_t", 5),
        ("gtx1080", "vit_b", 10),
        ("rtx5000", "vit_t", 20),
        ("rtx5000", "vit_b", 10),
        ("v100", "vit_t", 45),
        ("v100", "vit_b", 35),
    ],
)
def test_all_layers_learn_and_from_no_fewer_objects_than_published(name, architecture, objects):
    preset = get_preset(name)
    assert preset.strategy == "full"
    assert preset.objects[architecture] >= objects


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_suggests_a_known_model_and_is_plain_data(name):
    preset = get_preset(name)
    known = known_model(preset.model)
    assert known is not None
    assert known.architecture in preset.objects
    assert json.loads(json.dumps(preset.to_dict()))["objects"] == preset.objects


def test_presets_cannot_be_changed():
    preset = get_preset("cpu-8gb")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.memory_gb = 100
    with pytest.raises(TypeError):
        PRESETS["cpu-8gb"] = preset
    preset.objects["vit_t"] = 100
    assert get_preset("cpu-8gb").objects["vit_t"] < 100
    assert copy.deepcopy(preset) == preset


@pytest.mark.parametrize(
    ("name", "says"), [("cpu8gb", "cpu-8gb"), ("h200x", "expected one of"), ("auto", "for a machine")]
)
def test_an_unknown_preset_is_refused(name, says):
    with pytest.raises(ConfigError, match=says):
        get_preset(name)


@pytest.mark.parametrize(
    ("free_gb", "expected"),
    [(5, "cpu-8gb"), (8, "cpu-8gb"), (15.9, "cpu-8gb"), (16, "cpu-16gb"), (40, "cpu-32gb"), (64, "cpu-64gb")],
)
def test_auto_goes_by_free_ram_and_not_by_what_is_installed(free_gb, expected):
    assert auto_preset(machine(free_gb=free_gb, total_gb=128)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GTX 1080", "gtx1080"),
        ("RTX 5000", "rtx5000"),
        ("RTX 3090", "rtx3090"),
        ("V100", "v100"),
        ("A100", "a100"),
        ("H200", "a100"),
    ],
)
def test_auto_on_each_card(name, expected):
    assert auto_preset(machine(card(name))) == expected


@pytest.mark.parametrize(("free_gb", "expected"), [(79, "v100"), (30, "rtx3090"), (9, "gtx1080"), (6, "gtx1080")])
def test_auto_goes_by_free_memory_of_the_card(free_gb, expected):
    assert auto_preset(machine(card("A100", free_gb=free_gb))) == expected


def test_auto_says_when_nothing_fits(caplog):
    assert auto_preset(machine(free_gb=5)) == "cpu-8gb"
    assert "no preset fits" in caplog.text
    assert "5.0 of 68.0 GB RAM" in caplog.text


def test_auto_passes_a_full_or_unusable_card_over():
    assert auto_preset(machine(card("A100", free_gb=2))) == "cpu-16gb"
    unusable = card("V100", has_kernels=False, advice="install torch 2.14 or older")
    assert auto_preset(machine(unusable)) == "cpu-16gb"


def test_auto_follows_the_chosen_device():
    hardware = machine(card("A100"), card("GTX 1080", 1))
    assert auto_preset(hardware, "cpu") == "cpu-16gb"
    assert auto_preset(hardware, "cuda") == "a100"
    assert auto_preset(hardware, "cuda:1") == "gtx1080"


def test_auto_on_apple():
    assert auto_preset(machine(has_mps=True)) == "mps"
    assert auto_preset(machine(has_mps=True, free_gb=7, total_gb=17)) == "mps"


@pytest.mark.parametrize(
    ("name", "hardware", "fits", "says"),
    [
        ("cpu-16gb", machine(free_gb=20), True, "20.0 of 68.0 GB RAM are free"),
        ("cpu-16gb", machine(free_gb=10), False, "takes up to 16 GB RAM, and 10.0 of 68.0"),
        ("cpu-8gb", machine(card("A100"), free_gb=20), True, "20.0"),
        ("gtx1080", machine(card("A100")), True, "free on A100"),
        ("gtx1080", machine(card("A100", free_gb=7)), False, "7.0 of 85.0 GB are free on A100"),
        ("gtx1080", machine(card("A100"), free_gb=10), True, "10.0 of 68.0 GB RAM"),
        ("a100", machine(card("A100"), free_gb=6), False, "takes up to 8 GB RAM"),
        ("a100", machine(card("RTX 3090")), False, "takes up to 80 GB on the card"),
        ("v100", machine(), False, "torch finds none"),
        ("v100", machine(gpu_problem="the driver is too old"), False, "the driver is too old"),
        ("v100", machine(card("V100", has_kernels=False, advice="install an older torch")), False, "an older torch"),
        ("mps", machine(), False, "Apple GPU"),
        ("mps", machine(has_mps=True), True, "RAM are free"),
        ("mps", machine(has_mps=True, free_gb=8), False, "takes up to 16 GB RAM"),
    ],
)
def test_what_fits_and_why(name, hardware, fits, says):
    answer, reason = preset_fits(get_preset(name), hardware)
    assert answer is fits
    assert says in reason
