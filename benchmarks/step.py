"""One training step, ours against micro-sam's `train_sam`: seconds and peak memory, each in a process of its own.

    python benchmarks/step.py --model vit_b --objects 10
    python benchmarks/step.py --model vit_b --objects 25 --levers checkpoint-encoder,checkpoint-instance-decoder,chunk=5
    python benchmarks/step.py --strategy frozen --json

Both start from the same weights and see the same patch of 512 px with the same number of objects. Times are medians
over the iterations after the first. On a CPU, peak memory is the most that the process held, imports included; on CUDA
it is the most that tensors took. `--ours-only` and `--micro-sam-only` run one of the two.
"""

from __future__ import annotations

import argparse
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
    "chunk=N",
    "targets=T",
)


def main() -> None:
    """Run the comparison, or one side of it when called by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b", choices=("vit_t", "vit_b", "vit_l", "vit_h"))
    parser.add_argument("--strategy", default="full", choices=("full", "frozen"))
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

    from napari_resfinetune.config import FrozenStrategy, FullStrategy
    from napari_resfinetune.models import apply_strategy, load_model
    from napari_resfinetune.planning import choose_precision, probe_hardware
    from napari_resfinetune.training.prepare import DTYPES
    from napari_resfinetune.training.prompts import plan_training_prompts
    from napari_resfinetune.training.step import StepSettings, backward_sample

    levers = dict(lever.partition("=")[::2] for lever in options.levers.split(",") if lever)
    targets: Any = levers.get("targets", "both")
    if options.threads:
        torch.set_num_threads(options.threads)
    precision = next((name for name in DTYPES if name in levers), None)
    if precision is None:
        precision = choose_precision("auto", options.device, probe_hardware()).name
    model = load_model(options.checkpoint, decoder="new", device=options.device)
    apply_strategy(model, FullStrategy() if options.strategy == "full" else FrozenStrategy(), targets)
    settings = StepSettings(
        autocast=DTYPES[precision],
        object_chunk=int(levers["chunk"]) if "chunk" in levers else None,
        checkpoint_encoder="checkpoint-encoder" in levers,
        checkpoint_instance_decoder="checkpoint-instance-decoder" in levers,
        folded_attention="unfolded" not in levers,
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    patch = _patch(options.objects)
    seconds = []
    for step in range(options.iterations):
        started = time.perf_counter()
        model.train()
        optimizer.zero_grad(set_to_none=True)
        plan = None
        if targets != "instances":
            plan = plan_training_prompts(
                patch.labels,
                np.random.default_rng(step),
                step=step,
                objects=options.objects,
                sub_iterations=options.sub_iterations,
                mask_prompt_probability=0.5,
            )
        backward_sample(model, patch, plan, settings, train_instances=targets != "masks")
        optimizer.step()
        _wait(options.device)
        seconds.append(time.perf_counter() - started)
    return seconds, _peak_gb(options.device)


def run_micro_sam(options: argparse.Namespace) -> tuple[list[float], float]:
    """Time `train_sam` from one request for a batch to the next."""
    import torch
    from micro_sam.training import train_sam
    from torch.utils.data import DataLoader, Dataset

    if options.threads:
        torch.set_num_threads(options.threads)
    patch = _patch(options.objects)
    x, y = patch.image, torch.cat([patch.labels[None].float(), patch.targets])
    times: list[float] = []

    class Samples(Dataset):  # type: ignore[type-arg]
        def __init__(self, count: int, log: list[float] | None) -> None:
            self.count, self.log, self.ndim = count, log, 2

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if self.log is not None:
                _wait(options.device)
                self.log.append(time.perf_counter())
            return x, y

    loaders = [
        DataLoader(Samples(options.iterations + 1, times), shuffle=True),
        DataLoader(Samples(1, None), shuffle=True),
    ]
    with tempfile.TemporaryDirectory() as folder:
        train_sam(
            name="benchmark",
            model_type=options.model,
            train_loader=loaders[0],
            val_loader=loaders[1],
            n_epochs=1,
            n_objects_per_batch=options.objects,
            n_sub_iteration=options.sub_iterations,
            checkpoint_path=options.checkpoint,
            freeze=["image_encoder"] if options.strategy == "frozen" else None,
            device=options.device,
            save_root=folder,
            verify_n_labels_in_loader=None,
        )
    return [after - before for before, after in itertools.pairwise(times)], _peak_gb(options.device)


def _patch(objects: int) -> Any:
    """Return a made-up patch with at least as many objects as are asked for."""
    import numpy as np
    import torch

    from napari_resfinetune.data.patches import Patch, instance_targets
    from napari_resfinetune.data.synthetic import make_sample

    for seed in range(100):
        sample = make_sample("fluorescence_nuclei", seed=seed, shape=(PATCH_PX, PATCH_PX))
        targets = instance_targets(sample.labels.astype(np.int64), 25)
        if targets is not None and targets[0].max() >= max(objects, 40):
            break
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
