"""The number format for each kind of device, and what is refused."""

from __future__ import annotations

import pytest

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.planning import Gpu, Hardware, choose_precision


def machine(capability: tuple[int, int] | None = None, features: tuple[str, ...] = ("avx2",)) -> Hardware:
    gpus = (Gpu(0, "a card", 16.0, 15.0, capability),) if capability else ()
    return Hardware("a CPU", 4, 8, 32.0, 30.0, cpu_features=features, gpus=gpus)


@pytest.mark.parametrize(
    ("card", "capability", "name", "scaler"),
    [
        ("GTX 1080", (6, 1), "fp32", False),
        ("P100", (6, 0), "fp32", False),
        ("V100", (7, 0), "fp16", True),
        ("RTX 5000", (7, 5), "fp16", True),
        ("A100", (8, 0), "bf16", False),
        ("RTX 3090", (8, 6), "bf16", False),
        ("H200", (9, 0), "bf16", False),
        ("RTX 5090", (12, 0), "bf16", False),
    ],
)
def test_auto_on_cards(card, capability, name, scaler):
    choice = choose_precision("auto", "cuda", machine(capability))
    assert (choice.name, choice.scaler) == (name, scaler), card
    assert f"{capability[0]}.{capability[1]}" in choice.reason


@pytest.mark.parametrize(
    ("features", "name", "because"),
    [
        (("avx2", "avx512_bf16", "amx_bf16"), "bf16", "amx_bf16"),
        (("avx2", "avx512_bf16"), "bf16", "avx512_bf16"),
        (("avx2", "avx512f"), "fp32", "neither"),
        ((), "fp32", "neither"),
    ],
)
def test_auto_on_a_cpu(features, name, because):
    choice = choose_precision("auto", "cpu", machine(features=features))
    assert (choice.name, choice.scaler) == (name, False)
    assert because in choice.reason


def test_the_cpu_decides_on_the_cpu_even_beside_a_card():
    assert choose_precision("auto", "cpu", machine((8, 0))).name == "fp32"


def test_auto_on_apple():
    choice = choose_precision("auto", "mps", machine())
    assert (choice.name, choice.scaler) == ("fp32", False)
    assert "Apple" in choice.reason


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_fp32_is_had_everywhere(device):
    assert choose_precision("fp32", device, machine((6, 1))).name == "fp32"


@pytest.mark.parametrize(
    ("requested", "device", "capability", "scaler", "says"),
    [
        ("fp16", "cuda", (8, 6), True, "as asked"),
        ("fp16", "cuda:0", (7, 5), True, "as asked"),
        ("fp16", "cuda", (6, 1), True, "slow"),
        ("bf16", "cuda", (8, 6), False, "TF32"),
        ("bf16", "cpu", None, False, "slower in it than in fp32"),
    ],
)
def test_what_is_asked_for_is_taken(requested, device, capability, scaler, says):
    choice = choose_precision(requested, device, machine(capability))
    assert (choice.name, choice.scaler) == (requested, scaler)
    assert says in choice.reason


@pytest.mark.parametrize(
    ("requested", "device", "capability", "instead"),
    [
        ("bf16", "cuda", (7, 5), "choose auto or fp16"),
        ("bf16", "cuda", (7, 0), "choose auto or fp16"),
        ("bf16", "cuda", (6, 1), "choose auto or fp32"),
        ("fp16", "cuda", (5, 2), "choose auto or fp32"),
        ("fp16", "cpu", None, "choose auto or fp32"),
        ("fp16", "mps", None, "choose auto or fp32"),
        ("bf16", "mps", None, "choose auto or fp32"),
        ("auto", "cuda", None, "not on this machine"),
    ],
)
def test_what_the_device_cannot_do_is_refused(requested, device, capability, instead):
    with pytest.raises(ResourceError, match=instead) as caught:
        choose_precision(requested, device, machine(capability))
    assert str(caught.value).startswith(f"precision {requested}: ")


def test_fp16_on_a_cpu_with_bf16_points_there():
    with pytest.raises(ResourceError, match="bf16, which this CPU computes in"):
        choose_precision("fp16", "cpu", machine(features=("amx_bf16",)))


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="expected auto, fp32, bf16, fp16"):
        choose_precision("fp8", "cpu", machine())
