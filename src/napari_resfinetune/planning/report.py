"""What ``resfinetune doctor`` says: versions, devices, presets, models, network."""

from __future__ import annotations

import socket
from typing import Any

from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.models.names import KNOWN_MODELS, is_downloaded, models_folder
from napari_resfinetune.planning.hardware import Hardware, environment_report, pick_device, probe_hardware
from napari_resfinetune.planning.precision import choose_precision
from napari_resfinetune.planning.presets import PRESETS, auto_preset, preset_fits

# Where micro-sam's generalists lie; being able to reach it is what a first download needs.
MODEL_HOST = "uk1s3.embassy.ebi.ac.uk"
REACH_SECONDS = 3.0
SHOWN_PACKAGES = ("napari-resfinetune", "torch", "micro-sam", "napari", "timm", "zarr")


def doctor_report() -> dict[str, Any]:
    """Look at this computer.

    Returns
    -------
    dict
        ``sections``, each with ``title`` and ``rows`` of (what, found); ``advice``, sentences on what to do; and the
        same facts by name under ``hardware``, ``packages``, ``device``, ``precision``, ``preset``, ``presets``,
        ``models_folder``, ``downloaded_models`` and ``network``.
    """
    hardware = probe_hardware()
    environment = environment_report(hardware)
    device, notes = pick_device("auto", hardware)
    precision = choose_precision("auto", device, hardware)
    fits = {name: preset_fits(preset, hardware) for name, preset in PRESETS.items()}
    best = auto_preset(hardware, device)
    downloaded = [known.name for known in KNOWN_MODELS if not known.embedded and is_downloaded(known.name)]
    online = reaches(MODEL_HOST)
    packages = environment["packages"]
    sections = [
        {
            "title": "Versions",
            "rows": [("python", hardware.python), *((n, packages.get(n) or "-") for n in SHOWN_PACKAGES)],
        },
        {"title": "Computer", "rows": _computer(hardware)},
        {
            "title": "Training would use",
            "rows": [("device", device), ("number format", f"{precision.name}: {precision.reason}"), ("preset", best)],
        },
        {
            "title": "Presets",
            "rows": [(n, f"{'fits' if fit else 'does not fit'}: {why}") for n, (fit, why) in fits.items()],
        },
        {
            "title": "Models",
            "rows": [
                ("folder", str(models_folder())),
                ("downloaded", ", ".join(downloaded) or "none"),
                ("network", "reachable" if online else f"{MODEL_HOST} cannot be reached"),
            ],
        },
    ]
    return {
        "sections": sections,
        "advice": [*notes, *_advice(hardware, online, downloaded)],
        "hardware": hardware.to_dict(),
        "packages": packages,
        "device": device,
        "precision": precision.name,
        "preset": best,
        "presets": {name: {"fits": fit, "reason": why} for name, (fit, why) in fits.items()},
        "models_folder": str(models_folder()),
        "downloaded_models": downloaded,
        "network": online,
    }


def reaches(host: str) -> bool:
    """Say whether a host answers on its HTTPS port."""
    try:
        with socket.create_connection((host, 443), timeout=REACH_SECONDS):
            return True
    except (OSError, ResFinetuneError):
        return False


def _computer(hardware: Hardware) -> list[tuple[str, str]]:
    memory = f"{hardware.memory_free_gb:.1f} of {hardware.memory_total_gb:.1f} GB free"
    rows = [
        ("system", hardware.platform),
        ("CPU", f"{hardware.cpu}, {hardware.logical_cores} threads"),
        ("16-bit on the CPU", ", ".join(hardware.cpu_features) or "-"),
        ("memory", memory),
    ]
    rows += [
        (f"GPU {gpu.index}", f"{gpu.name}, {gpu.memory_free_gb:.1f} of {gpu.memory_total_gb:.1f} GB free")
        for gpu in hardware.gpus
    ]
    if not hardware.gpus:
        rows.append(("GPU", "Apple GPU" if hardware.has_mps else hardware.gpu_problem or "none"))
    return rows


def _advice(hardware: Hardware, online: bool, downloaded: list[str]) -> list[str]:
    advice = [f"{gpu.name}: {gpu.advice}" for gpu in hardware.gpus if gpu.advice]
    if not online and not downloaded:
        advice.append(
            "no network and no downloaded model: --model starter comes with this package; better, copy a micro-sam "
            f"checkpoint here and give its path, or put the files of a model into {models_folder()}"
        )
    return advice
