"""What the machine is found to have, on faked cards and control groups, and which device is picked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import psutil
import pytest
import torch

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.planning import (
    Gpu,
    Hardware,
    MemoryGauge,
    environment_report,
    gpu_memory_gb,
    peak_memory_gb,
    pick_device,
    probe_hardware,
    process_memory_gb,
)
from napari_resfinetune.planning.cgroups import usable_cores, usable_memory_gb
from napari_resfinetune.planning.hardware import has_kernels, kernel_advice

TORCH_2_15 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
TORCH_2_14_CUDA_12_6 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CARDS = {
    "GTX 1080": ((6, 1), 8.5),
    "V100": ((7, 0), 34.0),
    "RTX 5000": ((7, 5), 16.9),
    "RTX 3090": ((8, 6), 25.3),
    "A100": ((8, 0), 85.0),
    "H200": ((9, 0), 149.0),
}
GIB = 2**30


def card(name: str, index: int = 0, free_gb: float | None = None, arch_list: tuple[str, ...] = TORCH_2_15) -> Gpu:
    capability, total_gb = CARDS[name]
    usable = has_kernels(capability, arch_list)
    advice = "" if usable else kernel_advice(capability, arch_list, "2.15.0")
    return Gpu(index, name, total_gb, total_gb - 0.3 if free_gb is None else free_gb, capability, usable, advice)


def machine(*gpus: Gpu, **changes: object) -> Hardware:
    values = {
        "cpu": "a CPU",
        "physical_cores": 8,
        "logical_cores": 16,
        "memory_total_gb": 34.0,
        "memory_free_gb": 28.0,
        "torch": "2.15.0",
        "torch_cuda": "13.2",
        **changes,
    }
    return Hardware(gpus=gpus, **values)


@pytest.mark.parametrize(
    ("name", "with_2_15", "with_2_14"),
    [
        ("GTX 1080", False, True),
        ("V100", False, True),
        ("RTX 5000", True, True),
        ("RTX 3090", True, True),
        ("A100", True, True),
        ("H200", True, True),
    ],
)
def test_kernels_for_each_card(name, with_2_15, with_2_14):
    capability, _ = CARDS[name]
    assert has_kernels(capability, TORCH_2_15) is with_2_15
    assert has_kernels(capability, TORCH_2_14_CUDA_12_6) is with_2_14


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [
        ((8, 9), ["sm_86"], True),  # machine code holds within a major version
        ((8, 0), ["sm_86"], False),  # but not backwards
        ((9, 0), ["sm_86"], False),
        ((9, 0), ["sm_86", "compute_86"], True),  # PTX holds for all later cards
        ((7, 5), ["compute_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["compute_90a"], False),  # "a" holds for that card only
        ((12, 1), ["sm_120f"], True),
        ((13, 0), ["compute_120f"], False),
        ((9, 4), ["gfx90a", "gfx942"], True),  # ROCm is for torch to judge
        ((6, 1), [], True),  # a build that does not tell
    ],
)
def test_code_of_a_build_against_a_card(capability, arch_list, runs):
    assert has_kernels(capability, arch_list) is runs


@pytest.mark.parametrize(
    ("capability", "says"),
    [
        ((6, 1), "install torch 2.14 or older built for CUDA 12.6"),
        ((7, 0), "install torch 2.14 or older built for CUDA 12.6"),
        ((3, 5), "train on the CPU"),
        ((13, 0), "install a newer torch"),
        ((8, 0), "official torch"),
    ],
)
def test_advice_names_what_to_install(capability, says):
    advice = kernel_advice(capability, ["sm_75", "sm_86", "sm_90"], "2.15.0")
    assert says in advice
    assert f"{capability[0]}.{capability[1]}" in advice


def test_probe_of_this_machine():
    hardware = probe_hardware()
    assert 1 <= hardware.physical_cores <= hardware.logical_cores <= os.cpu_count()
    assert 0 < hardware.memory_free_gb <= hardware.memory_total_gb <= psutil.virtual_memory().total / 1e9 + 1e-9
    assert hardware.torch == torch.__version__
    assert len(hardware.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(hardware.to_dict()))["cpu"] == hardware.cpu != ""


def fake_cuda(monkeypatch, cards, broken=()):
    """Let torch see cards: (name, capability, total bytes, free bytes)."""

    def properties(index):
        if index in broken:
            raise RuntimeError("CUDA error: unknown error")
        name, (major, minor), total, _ = cards[index]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=total)

    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: len(cards),
        "get_device_properties": properties,
        "get_arch_list": lambda: list(TORCH_2_15),
        "mem_get_info": lambda index: (cards[index][3], cards[index][2]),
        "memory_reserved": lambda index: 2 * 10**9,
        "memory_allocated": lambda index: 10**9,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "13.2")


def test_probe_reads_cards_and_counts_what_torch_holds_as_free(monkeypatch):
    fake_cuda(
        monkeypatch, [("RTX 3090", (8, 6), 25 * 10**9, 20 * 10**9), ("GTX 1080", (6, 1), 8 * GIB, 7 * GIB)], broken=()
    )
    first, second = probe_hardware().gpus
    assert (first.name, first.capability, first.has_kernels, first.advice) == ("RTX 3090", (8, 6), True, "")
    assert (first.memory_total_gb, first.memory_free_gb) == (25.0, 21.0)
    assert not second.has_kernels
    assert "torch 2.14 or older" in second.advice
    assert second.device == "cuda:1"


def test_one_broken_card_does_not_hide_the_other(monkeypatch):
    cards = [("A100", (8, 0), 85 * 10**9, 80 * 10**9)] * 2
    fake_cuda(monkeypatch, cards, broken={0})
    assert [gpu.index for gpu in probe_hardware().gpus] == [1]
    fake_cuda(monkeypatch, cards, broken={0, 1})
    hardware = probe_hardware()
    assert hardware.gpus == ()
    assert "none answers" in hardware.gpu_problem


def test_a_card_whose_memory_cannot_be_read_counts_as_full(monkeypatch):
    def refuse(index):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    fake_cuda(monkeypatch, [("A100", (8, 0), 85 * 10**9, 0)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    hardware = probe_hardware()
    assert hardware.gpus[0].memory_free_gb == 0
    assert pick_device("auto", hardware)[0] == "cpu"


def test_probe_repeats_torchs_own_words_about_the_driver(monkeypatch):
    def warn():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware = probe_hardware()
    assert "driver on your system is too old" in hardware.gpu_problem
    assert pick_device("auto", hardware) == ("cpu", (f"no GPU is used: {hardware.gpu_problem}",))
    with pytest.raises(ResourceError, match="too old"):
        pick_device("cuda", hardware)


def test_probe_sees_that_cards_are_hidden(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES" in probe_hardware().gpu_problem


def test_probe_sees_torch_without_cuda_beside_a_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    hardware = probe_hardware()
    assert hardware.torch_cuda is None
    assert "built without CUDA" in hardware.gpu_problem


def test_probe_never_raises(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    for target in ("psutil.virtual_memory", "psutil.cpu_count", "torch.cuda.is_available", "platform.platform"):
        monkeypatch.setattr(target, fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", fail)
    hardware = probe_hardware()
    assert (hardware.physical_cores, hardware.memory_free_gb, hardware.gpus) == (1, 0.0, ())
    assert pick_device("auto", hardware)[0] == "cpu"


def test_probe_survives_a_broken_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    hardware = probe_hardware()
    assert hardware.torch is None
    with pytest.raises(ResourceError, match="torch cannot be imported"):
        pick_device("cuda", hardware)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def big_machine(monkeypatch):
    """64 GB of RAM, 60 of them free; 8 cores with two threads each."""
    memory = SimpleNamespace(total=64 * 10**9, available=60 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


VERSION_2 = "sys/fs/cgroup/"
VERSION_1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (64, 60)),
        ({"proc/self/cgroup": "0::/\n", VERSION_2 + "memory.max": "max\n"}, (64, 60)),
        (  # a container that sees its own group as the top; file cache counts as free
            {
                "proc/self/cgroup": "0::/\n",
                VERSION_2 + "memory.max": "8000000000\n",
                VERSION_2 + "memory.current": "3000000000\n",
                VERSION_2 + "memory.stat": "anon 2000000000\ninactive_file 1000000000\n",
            },
            (8, 6),
        ),
        (  # a batch job: the limit is on a group above
            {
                "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
                VERSION_2 + "slurm/job_7/step_0/memory.max": "max\n",
                VERSION_2 + "slurm/job_7/memory.max": "16000000000\n",
                VERSION_2 + "slurm/job_7/memory.current": "1000000000\n",
            },
            (16, 15),
        ),
        (  # version 1, with the host's path, which does not exist inside
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n",
                VERSION_1 + "memory.limit_in_bytes": "4000000000\n",
                VERSION_1 + "memory.usage_in_bytes": "2500000000\n",
                VERSION_1 + "memory.stat": "inactive_file 1\ntotal_inactive_file 500000000\n",
            },
            (4, 1.5),
        ),
        (
            {"proc/self/cgroup": "4:memory:/\n", VERSION_1 + "memory.limit_in_bytes": "9223372036854771712\n"},
            (64, 60),
        ),
        (  # used up
            {
                "proc/self/cgroup": "0::/\n",
                VERSION_2 + "memory.max": "2000000000\n",
                VERSION_2 + "memory.current": "2100000000\n",
            },
            (2, 0),
        ),
    ],
)
def test_memory_under_control_groups(tmp_path, big_machine, files, expected):
    write(tmp_path, files)
    total_gb, free_gb = usable_memory_gb(tmp_path)
    assert total_gb == pytest.approx(expected[0])
    assert free_gb == pytest.approx(expected[1], abs=0.01)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (8, 16)),
        ({"proc/self/cgroup": "0::/job\n", VERSION_2 + "job/cpu.max": "max 100000\n"}, (8, 16)),
        ({"proc/self/cgroup": "0::/job\n", VERSION_2 + "job/cpu.max": "350000 100000\n"}, (3, 3)),
        ({"proc/self/cgroup": "0::/job\n", VERSION_2 + "job/cpu.max": "50000 100000\n"}, (1, 1)),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/\n",
                VERSION_2 + "cpu/cpu.cfs_quota_us": "1200000\n",
                VERSION_2 + "cpu/cpu.cfs_period_us": "100000\n",
            },
            (8, 12),
        ),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/\n",
                VERSION_2 + "cpu/cpu.cfs_quota_us": "-1\n",
                VERSION_2 + "cpu/cpu.cfs_period_us": "100000\n",
            },
            (8, 16),
        ),
    ],
)
def test_cores_under_a_quota(tmp_path, big_machine, files, expected):
    write(tmp_path, files)
    assert usable_cores(tmp_path) == expected


def test_cores_under_affinity(tmp_path, big_machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert usable_cores(tmp_path) == (2, 4)


def test_auto_takes_the_card_with_most_free_memory():
    assert pick_device("auto", machine(card("RTX 3090"))) == ("cuda", ())
    assert pick_device("auto", machine(card("RTX 3090", 0, 10.0), card("RTX 3090", 1, 20.0))) == ("cuda:1", ())


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (card("GTX 1080"), "torch 2.14 or older"),
        (card("V100"), "torch 2.14 or older"),
        (card("A100", free_gb=3.9), "3.9 of 85.0 GB are free"),
    ],
)
def test_auto_passes_a_card_over_and_says_why(gpu, why):
    device, (reason,) = pick_device("auto", machine(gpu))
    assert device == "cpu"
    assert reason.startswith(f"{gpu.name} (cuda)")
    assert why in reason
    assert pick_device("auto", machine(gpu, card("RTX 5000", 1))) == ("cuda:1", (reason,))


def test_old_cards_are_used_with_a_torch_that_knows_them():
    for name in ("GTX 1080", "V100"):
        assert pick_device("auto", machine(card(name, arch_list=TORCH_2_14_CUDA_12_6))) == ("cuda", ())


def test_auto_without_a_card():
    assert pick_device("auto", machine()) == ("cpu", ())
    assert pick_device("auto", machine(has_mps=True)) == ("mps", ())


def test_a_named_device_is_taken():
    two = machine(card("RTX 3090", 0, 5.0), card("A100", 1))
    assert pick_device("cpu", two) == ("cpu", ())
    assert pick_device("cuda", two) == ("cuda:1", ())
    assert pick_device("cuda:0", two) == ("cuda", ())
    assert pick_device("mps", machine(has_mps=True)) == ("mps", ())


def test_a_named_card_that_is_nearly_full_is_taken_with_a_warning():
    device, (reason,) = pick_device("cuda", machine(card("A100", free_gb=1.0)))
    assert device == "cuda"
    assert "1.0 of 85.0 GB" in reason


@pytest.mark.parametrize(
    ("requested", "hardware", "why"),
    [
        ("mps", machine(), "no Apple GPU"),
        ("cuda", machine(), "finds no card"),
        ("cuda", machine(torch_cuda=None), "built without CUDA"),
        ("cuda", machine(has_mps=True, torch_cuda=None), "built without CUDA"),
        ("cuda", machine(card("V100")), "torch 2.14 or older"),
        ("cuda:0", machine(card("GTX 1080"), card("A100", 1)), "GTX 1080"),
        ("cuda:4", machine(card("A100")), "there is cuda:0"),
    ],
)
def test_a_named_device_that_cannot_be_used_is_refused(requested, hardware, why):
    with pytest.raises(ResourceError, match=why) as caught:
        pick_device(requested, hardware)
    assert str(caught.value).startswith(f"device {requested}: ")


@pytest.mark.parametrize("requested", ["gpu", "", "cuda:", "cuda:x"])
def test_an_unknown_device_is_refused(requested):
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or mps"):
        pick_device(requested, machine(card("A100")))


def test_environment_report_is_plain_data():
    report = json.loads(json.dumps(environment_report(machine(card("A100")))))
    assert report["packages"]["torch"].startswith("2.")
    assert {"napari-resfinetune", "micro-sam", "segment-anything-py", "torch-em", "timm", "zarr"} <= set(
        report["packages"]
    )
    assert report["hardware"]["gpus"][0]["name"] == "A100"


def test_planning_loads_no_torch():
    code = "import napari_resfinetune.planning, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_process_memory_sees_what_is_taken_and_counts_children():
    before = process_memory_gb()
    block = bytearray(200 * 10**6)
    block[::4096] = b"x" * len(block[::4096])
    assert process_memory_gb() - before == pytest.approx(0.2, abs=0.05)
    peak = peak_memory_gb()
    del block
    # The kernel counts pages per CPU and sums them up later, so that figures differ a little between calls.
    assert peak_memory_gb() > peak - 0.02
    assert peak > before
    code = "block = bytearray(b'x' * 10**8); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        alone = psutil.Process().memory_info().rss / 1e9
        assert child.stdout.readline() == "ready\n"
        assert process_memory_gb() > alone + 0.1
    finally:
        child.communicate("\n")


def test_gauge_of_the_process():
    gauge = MemoryGauge("cpu", limit_gb=8)
    reading = gauge.read()
    assert 0 < reading.now_gb <= reading.peak_gb
    assert reading.limit_gb == 8
    assert gauge.read().peak_gb >= reading.peak_gb


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak cannot be forgotten")
def test_what_was_taken_before_is_no_peak_of_the_next_run():
    block = bytearray(b"x" * 600 * 10**6)
    assert MemoryGauge("cpu").read().peak_gb > 0.6
    taken = process_memory_gb()
    del block
    assert MemoryGauge("cpu").read().peak_gb < taken - 0.4


def test_gauge_of_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)
    reading = MemoryGauge("cuda:1").read()
    assert (reading.now_gb, reading.peak_gb, reading.limit_gb) == (3, 5, None)
    assert gpu_memory_gb("cpu") == (0, 0)


def test_gauge_of_an_apple_gpu_remembers_the_peak(monkeypatch):
    taken = iter([2 * 10**9, 10**9])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(taken))
    gauge = MemoryGauge("mps")
    gauge.read()
    reading = gauge.read()
    assert (reading.now_gb, reading.peak_gb) == (1, 2)


@pytest.mark.gpu
def test_probe_of_a_real_card():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gpu = probe_hardware().gpus[0]
    assert gpu.has_kernels
    assert 0 < gpu.memory_free_gb <= gpu.memory_total_gb
