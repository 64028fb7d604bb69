"""Files that diffusers takes as they are: each component's name, then the names of its own modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.readers.diffusers.handed import Conversion
from fastlora.dialects.verdicts import Finding, Refused

PEFT = ".lora_A.weight"
OLDER = (".lora.down.weight", "_lora.down.weight")
"""How an ``A`` ends that is renamed on loading."""
DORA = Finding("wrong", "it drops the dora_scale, and takes the rest for a plain LoRA")


def require_lora(keys: Iterable[str], *also: str) -> None:
    """Stops as pipelines do whose first check is that ``lora`` is in every name."""
    for key in keys:
        if not any(text in key for text in ("lora", *also)):
            raise Refused("ValueError", f"'lora' is not in the name {key!r}")


def without_dora(file: FileFacts, conversion: Conversion) -> list[str]:
    """The names that are left after diffusers dropped ``dora_scale``, which it does not apply."""
    conversion.wrong |= {m.stem: DORA for m in file.modules.values() if "dora_scale" in m.keys}
    return [key for key in file.keys if "dora_scale" not in key]


def hand_over(file: FileFacts, conversion: Conversion, denoiser: str, texts: Iterable[str] = ()) -> None:
    """Hands every module over whose name begins with that of a component."""
    for component, prefix in (("", f"{denoiser}."), *((text, f"{text}.") for text in texts)):
        modules = [m for m in file.modules.values() if m.stem.startswith(prefix)]
        if modules and component:
            text_encoder(modules, conversion)
        elif modules:
            first = next(key for key in file.keys if key.startswith(prefix))
            hand_to_denoiser(modules, conversion, "lora_A" in first, prefix)


def hand_to_denoiser(
    modules: Iterable[ModuleFacts], conversion: Conversion, is_peft: bool = True, prefix: str | None = None
) -> None:
    """Hands modules over that PEFT finds by their names. ``is_peft``: nothing is renamed."""
    taken = PEFT if is_peft else (PEFT, *OLDER)
    has_up = False
    for module in modules:
        suffix = module.suffix
        has_up = has_up or suffix.startswith(".lora_A") or (not is_peft and suffix in OLDER)
        if not module.in_diffusers_names or (prefix is not None and module.prefix != prefix):
            conversion.stray(module)
        elif suffix == PEFT or suffix in taken:
            conversion.take(module)
        else:
            conversion.drop([module], f"its factors are not called {PEFT[1:]}")
    if not has_up:
        raise Refused("IndexError", "no factor is called lora_B")


def text_encoder(modules: list[ModuleFacts], conversion: Conversion, scales: Mapping[str, float] | None = None) -> None:
    """Hands modules of a text encoder over, whose spelling is guessed from some of them."""
    suffixes = {m.suffix for m in modules}
    attention = [m for m in modules if ".self_attn." in m.named.path]
    has_old_output = any(m.suffix == "_lora.down.weight" and m.named.path.endswith("out_proj") for m in modules)
    is_peft = PEFT in suffixes and any(m.suffix == PEFT for m in attention)
    if not (has_old_output or is_peft or ".lora_linear_layer.down.weight" in suffixes):
        raise Refused("ValueError", f"it cannot tell how the modules of {modules[0].named.component} are spelled")
    for module in modules:
        if module.suffix in (PEFT, "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora.down.weight"):
            conversion.take(module, (scales or {}).get(module.stem, 1.0))
        else:
            conversion.drop([module], "its factors are called otherwise")
