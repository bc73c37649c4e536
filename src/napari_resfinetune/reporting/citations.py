"""What to cite for a run, by what it used."""

from __future__ import annotations

from dataclasses import dataclass

from napari_resfinetune.config import FinetuneConfig


@dataclass(frozen=True)
class Citation:
    """A paper or package.

    Attributes
    ----------
    what
        What it is cited for.
    text
        Authors, title and place.
    url
        Where it is.
    """

    what: str
    text: str
    url: str


SAM = Citation(
    "Segment Anything",
    "Kirillov et al. (2023): Segment Anything. ICCV.",
    "https://arxiv.org/abs/2304.02643",
)
MICRO_SAM = Citation(
    "micro-sam: start models, decoder, training recipe",
    "Archit et al. (2025): Segment Anything for Microscopy. Nature Methods 22.",
    "https://doi.org/10.1038/s41592-024-02580-4",
)
MOBILE_SAM = Citation(
    "vit_t",
    "Zhang et al. (2023): Faster Segment Anything: Towards Lightweight SAM for Mobile Applications.",
    "https://arxiv.org/abs/2306.14289",
)
TINY_VIT = Citation(
    "vit_t's image encoder",
    "Wu et al. (2022): TinyViT: Fast Pretraining Distillation for Small Vision Transformers. ECCV.",
    "https://arxiv.org/abs/2207.10666",
)
LORA = Citation(
    "LoRA",
    "Hu et al. (2022): LoRA: Low-Rank Adaptation of Large Language Models. ICLR.",
    "https://arxiv.org/abs/2106.09685",
)
PEFT = Citation(
    "LoRA layers",
    "Mangrulkar et al. (2022): PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods.",
    "https://github.com/huggingface/peft",
)
TORCH_EM = Citation(
    "instance decoder's targets and loss",
    "Pape: torch-em, deep learning for image segmentation in microscopy.",
    "https://doi.org/10.5281/zenodo.5108853",
)
MSA = Citation(
    "SA50, SA75, mSA",
    "Caicedo et al. (2019): Nucleus segmentation across imaging experiments. Nature Methods 16.",
    "https://doi.org/10.1038/s41592-019-0612-7",
)


def citations_for(config: FinetuneConfig, architecture: str, *, compared: bool) -> tuple[Citation, ...]:
    """Return what to cite for a run.

    Parameters
    ----------
    config
        Of the run.
    architecture
        Of its model.
    compared
        Whether there are scores.
    """
    found = [SAM, MICRO_SAM]
    if architecture == "vit_t":
        found += [MOBILE_SAM, TINY_VIT]
    if config.strategy.kind in ("lora", "late_lora"):
        found += [LORA, PEFT]
    if config.training.targets != "masks":
        found.append(TORCH_EM)
    if compared:
        found.append(MSA)
    return tuple(found)
