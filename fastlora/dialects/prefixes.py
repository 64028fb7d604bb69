"""What stands before the name of a module in a single file: the component, and how the name is spelled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

DENOISER = ""
_FLAT = {
    "lora_unet_llm_adapter_": "text_conditioner",  # Anima: a small model of its own in diffusers
    "lora_unet__": DENOISER,  # Wan-Fun
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lycoris_": DENOISER,
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te3_": "te3",
    "lora_te_": "te",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "prior_te",
}
_DOTTED = {
    "model.diffusion_model.llm_adapter.": "text_conditioner",
    "diffusion_model.llm_adapter.": "text_conditioner",
    "text_conditioner.": "text_conditioner",
    "model.diffusion_model.": DENOISER,
    "diffusion_model.": DENOISER,
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "transformer_2.": "transformer_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_ENCODERS, _TRANSFORMER, _PEFT = "text_encoders.", "transformer.", "base_model.model."


@dataclass(frozen=True, slots=True)
class Prefixed:
    """A stem in two: ``prefix + rest`` is the stem.

    ``component``: ``""`` for the denoiser, else as the file calls it: ``te``, ``te1``, ``te2``, ``te3``, ``clip_l``,
    ``t5xxl``, …, or as diffusers does: ``text_encoder_2``, ``transformer_2``. ``is_flat``: dots are underscores.
    """

    component: str
    prefix: str
    rest: str
    is_flat: bool


@lru_cache(1 << 16)
def split_prefix(stem: str) -> Prefixed:
    """Cuts the prefix off the name of a module, as a file has it without the suffix of its tensors."""
    if stem.startswith(("lora_", "lycoris_")):
        for prefix, component in _FLAT.items():
            if stem.startswith(prefix):
                return Prefixed(component, prefix, stem[len(prefix) :], True)
    component, length = _dotted(stem)
    if stem.startswith(_PEFT, length):
        length += len(_PEFT)
        if not component and length == len(_PEFT):  # a saved PEFT model of a whole pipeline's part
            component, more = _dotted(stem[length:])
            length += more
    return Prefixed(component, stem[:length], stem[length:], False)


def _dotted(stem: str) -> tuple[str, int]:
    """The component of a dotted stem, and the length of its prefix."""
    for prefix, component in _DOTTED.items():
        if stem.startswith(prefix):
            return component, len(prefix)
    if stem.startswith(_ENCODERS):
        component, dot, rest = stem[len(_ENCODERS) :].partition(".")
        if dot:
            length = len(_ENCODERS) + len(component) + 1
            return component, length + (len(_TRANSFORMER) if rest.startswith(_TRANSFORMER) else 0)
    return DENOISER, 0
