"""One training step, ours against micro-sam's `train_sam`: seconds and peak memory, each in a process of its own.

    python benchmarks/step.py --model vit_b --objects 10
    python benchmarks/step.py --model vit_b --objects 25 --levers checkpoint-encoder,checkpoint-instance-decoder,chunk=5
    python benchmarks/step.py --strategy frozen --json

Both start from the same weights and see the same patch of 512 px with the same number of objects. Times are medians
over the iterations after the first, so that what is frozen comes from the feature cache, as after the first epoch.
micro-sam has no late strategies; beside them it does its full step. On a CPU, peak memory is the most that the process
held, imports included; on CUDA it is the most that tensors took. `--ours-only` and `--micro-sam-only` run one side.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PATCH_PX = 512
LEVERS = (
    "fp32",
    "bf16",
    "fp16",
    "checkpoint-encoder",
    "checkpoint-instance-decoder",
    "unfolded",
    "compile",
    "chunk=N",
    "input=PX",
    "stretched",
    "alternating",
    "return-memory",
    "no-cache",
    "targets=T",
)


def main() -> None:
    """Run the comparison, or one side of it when called by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b", choices=("vit_t", "vit_b", "vit_l", "vit_h"))
    parser.add_argument("--strategy", default="full", choices=("full", "frozen", "late", "lora", "late_lora"))
    parser.add_argument("--blocks", type=int, default=3, help="of the late strategies")
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--sub-iterations", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=4, help="the first is not counted")
    parser.add_argument("--levers", default="", help="of ours, comma-separated: " + ", ".join(LEVERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--micro-sam-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=("ours", "micro_sam"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        seconds, peak_gb = (run_ours if options.side == "ours" else run_micro_sam)(options)
        print(json.dumps({"seconds_per_iteration": statistics.median(seconds[1:]), "peak_gb": peak_gb}))
        return
    sides = ["ours", "micro_sam"]
    if options.ours_only or options.model == "vit_t":  # micro-sam needs a package for vit_t that is on no registry
        sides = ["ours"]
    if options.micro_sam_only:
        sides = ["micro_sam"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "start.pt"
        _write_start(options.model, checkpoint)
        results = {side: _in_process(side, checkpoint) for side in sides}
    if options.json:
        print(json.dumps(results))
    else:
        _print_table(options, results)


def run_ours(options: argparse.Namespace) -> tuple[list[float], float]:
    """Time our step: prompts, forward, backward, optimizer."""
    import numpy as np
    import torch

    from napari_resfinetune.models import apply_strategy, load_model
    from napari_resfinetune.planning import freed_memory
    from napari_resfinetune.planning.precision import tf32_as_chosen
    from napari_resfinetune.training.feature_cache import FeatureCache, name_of_part
    from napari_resfinetune.training.prompts import plan_training_prompts
    from napari_resfinetune.training.step import backward_samples, frozen_units

    settings, targets, precision = make_settings(options.levers, options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.checkpoint, decoder="new", device=options.device)
    apply_strategy(model, make_strategy(options), targets)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(options.device, enabled=precision.scaler)
    patch = make_patch(options.objects, patch_px_of(settings))
    levers = options.levers.split(",")
    features = None
    frozen = frozen_units(model, settings)
    if any(unit.is_block for unit in frozen) and "no-cache" not in levers:
        folder = Path(options.checkpoint).parent / "features"
        features = FeatureCache(folder, name_of_part(frozen, levers=options.levers), 20.0, print)

    def update(plan: Any, *, instances: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        backward_samples(model, [patch], [plan], settings, train_instances=instances, scaler=scaler, features=features)
        scaler.step(optimizer)
        scaler.update()

    def one_step(step: int) -> None:
        model.train()
        plan = plan_training_prompts(
            patch.labels,
            np.random.default_rng(step),
            step=step,
            objects=options.objects,
            sub_iterations=options.sub_iterations,
            mask_prompt_probability=0.5,
        )
        if "alternating" in levers:
            update(plan, instances=False)
            update(None, instances=True)
        else:
            update(None if targets == "instances" else plan, instances=targets != "masks")

    seconds = []
    with (
        freed_memory("return" if "return-memory" in levers else "keep"),
        tf32_as_chosen(precision, options.device),
    ):
        for step in range(options.iterations):
            started = time.perf_counter()
            one_step(step)
            _wait(options.device)
            seconds.append(time.perf_counter() - started)
    return seconds, _peak_gb(options.device)


def make_strategy(options: argparse.Namespace) -> Any:
    """Return the configuration of a strategy by its name."""
    from napari_resfinetune.config import FinetuneConfig

    settings = {"blocks": options.blocks} if options.strategy.startswith("late") else {}
    return FinetuneConfig.model_validate({"strategy": {"kind": options.strategy, **settings}}).strategy


def make_settings(levers: str, device: str) -> tuple[Any, Any, Any]:
    """Return `StepSettings`, targets and `PrecisionChoice` from comma-separated levers."""
    from napari_resfinetune.planning import choose_precision, probe_hardware
    from napari_resfinetune.training.step import DTYPES, StepSettings

    chosen = dict(lever.partition("=")[::2] for lever in levers.split(",") if lever)
    unknown = set(chosen) - {lever.partition("=")[0] for lever in LEVERS}
    if unknown:
        raise SystemExit(f"levers: {', '.join(sorted(unknown))} not known; expected {', '.join(LEVERS)}")
    if "unfolded" in chosen and "input" in chosen and "stretched" not in chosen:
        raise SystemExit("levers: unfolded attention stretches a smaller input; add stretched")
    named = next((name for name in DTYPES if name in chosen), "auto")
    precision = choose_precision(named, device, probe_hardware())
    settings = StepSettings(
        autocast=DTYPES[precision.name],
        object_chunk=int(chosen["chunk"]) if "chunk" in chosen else None,
        checkpoint_encoder="checkpoint-encoder" in chosen,
        checkpoint_instance_decoder="checkpoint-instance-decoder" in chosen,
        folded_attention="unfolded" not in chosen,
        compile="compile" in chosen,
        input_px=int(chosen.get("input", 1024)),
        positions="stretched" if "stretched" in chosen else "part",
    )
    return settings, chosen.get("targets", "both"), precision


def run_micro_sam(options: argparse.Namespace) -> tuple[list[float], float]:
    """Time `train_sam` from one request for a batch to the next."""
    import torch
    from micro_sam.training import train_sam
    from torch.utils.data import DataLoader

    if options.threads:
        torch.set_num_threads(options.threads)
    patch = make_patch(options.objects)
    sample = patch.image, torch.cat([patch.labels[None].float(), patch.targets])
    times: list[float] = []
    training: Any = DataLoader(_Repeated(sample, options.iterations, options.device, times), shuffle=True)  # type: ignore[arg-type]
    validation: Any = DataLoader(_Repeated(sample, 1, options.device))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        train_sam(
            name="benchmark",
            model_type=options.model,
            train_loader=training,
            val_loader=validation,
            n_epochs=1,
            n_objects_per_batch=options.objects,
            n_sub_iteration=options.sub_iterations,
            checkpoint_path=options.checkpoint,
            freeze=["image_encoder"] if options.strategy == "frozen" else None,
            peft_kwargs={"rank": 4} if options.strategy == "lora" else None,
            device=options.device,
            save_root=folder,
            verify_n_labels_in_loader=None,
        )
    return [after - before for before, after in itertools.pairwise(times)], _peak_gb(options.device)


class _Enough(Exception):
    """All iterations that were asked for are timed."""


class _Repeated:
    """The same sample again and again; writes down when it is asked for, and ends the run after the last time."""

    ndim = 2

    def __init__(self, sample: tuple[Any, Any], count: int, device: str, times: list[float] | None = None) -> None:
        self.sample, self.count, self.device, self.times = sample, count, device, times

    def __len__(self) -> int:
        return self.count + 1

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self.times is not None:
            _wait(self.device)
            self.times.append(time.perf_counter())
            if len(self.times) > self.count:
                raise _Enough
        return self.sample


def patch_px_of(settings: Any) -> int:
    """Return the side of the patch that fills the model's input at the usual scale, or all of it when stretched."""
    return PATCH_PX * (settings.input_px if settings.positions == "part" else 1024) // 1024


def make_patch(objects: int, patch_px: int = PATCH_PX) -> Any:
    """Return a made-up patch with many objects, at least as many as are asked for if they fit."""
    import numpy as np
    import torch

    from napari_resfinetune.data.patches import Patch, instance_targets
    from napari_resfinetune.data.synthetic import make_sample

    for seed in range(100 if patch_px == PATCH_PX else 1):
        sample = make_sample("fluorescence_nuclei", seed=seed, shape=(patch_px, patch_px), field_px=PATCH_PX)
        targets = instance_targets(sample.labels.astype(np.int64), 25)
        if targets is not None and targets[0].max() >= max(objects, 40):
            break
    assert targets is not None, "a drawing without objects"
    image = sample.image.astype(np.float32) / sample.image.max() * 255
    return Patch(
        torch.from_numpy(image)[None].expand(3, -1, -1).contiguous(),
        torch.from_numpy(targets[0].astype(np.int32)),
        torch.from_numpy(targets[1:].astype(np.float32)),
        0,
    )


def _write_start(model: str, path: Path) -> None:
    code = (
        "import sys; from napari_resfinetune.models import load_model, save_model; "
        "save_model(sys.argv[2], load_model('random:' + sys.argv[1], decoder='new'))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, model, str(path)], check=True)


def _in_process(side: str, checkpoint: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", *sys.argv, "--side", side, "--checkpoint", str(checkpoint)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: ended with status {done.returncode} (-9 means that it ran out of memory)")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _peak_gb(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    from napari_resfinetune.planning import peak_memory_gb

    return peak_memory_gb()


def _print_table(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    print(
        f"{options.model}, {options.strategy}, {options.objects} objects, {options.device}, "
        f"levers: {options.levers or '-'}"
    )
    print(f"{'':10} {'s / iteration':>14} {'peak GB':>8}")
    for side, result in results.items():
        print(f"{side:10} {result['seconds_per_iteration']:14.1f} {result['peak_gb']:8.1f}")
    if len(results) == 2:
        ours, theirs = results["ours"], results["micro_sam"]
        speed = theirs["seconds_per_iteration"] / ours["seconds_per_iteration"]
        print(f"{'ratio':10} {speed:12.1f} x {ours['peak_gb'] / theirs['peak_gb']:8.2f}")


if __name__ == "__main__":
    main()
