"""Flux.1 and its kin in diffusers."""

from __future__ import annotations

import re

from fastlora.dialects.adapter_metadata import KEY as METADATA
from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.readers.diffusers.direct import PEFT, hand_over, without_dora
from fastlora.dialects.readers.diffusers.handed import Conversion, as_written
from fastlora.dialects.verdicts import Finding, Refused

TEXT = "text_encoder"
DOUBLE, SINGLE, HIDDEN = 19, 38, 3072
"""Blocks that its converters count, and the width that they take for granted."""
BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\..+")
TOP = "it makes names without `transformer.` of modules outside the blocks, and nothing looks for these"
FLOATS = ("float", "bfloat")
WHOLE = tuple(
    [
        f"double_blocks.{i}.{leaf}"
        for i in range(DOUBLE)
        for leaf in (
            *(f"{side}_{part}" for side in ("img", "txt") for part in ("mod.lin", "attn.qkv", "attn.proj")),
            *(f"{side}_mlp.{n}" for side in ("img", "txt") for n in (0, 2)),
        )
    ]
    + [f"single_blocks.{i}.{leaf}" for i in range(SINGLE) for leaf in ("modulation.lin", "linear1", "linear2")]
    + ["final_layer.linear"]
)


def convert(file: FileFacts) -> Conversion:
    """What the pipelines of Flux make of a file."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if any(".lora_down.weight" in key for key in keys):
        _down_up(file, keys, conversion)
    elif any("processor" in key for key in keys):
        _xlabs(file, conversion)
    elif any("query_norm.scale" in key for key in keys):
        why = "a control LoRA enlarges the model, which is not followed here"
        conversion.wrong |= dict.fromkeys(file.modules, Finding("unsure", why))
    elif any("base_model" in key for key in keys):
        _whole_peft_model(file, conversion)
    else:
        _as_it_is(file, keys, conversion)
    return conversion


def _as_it_is(file: FileFacts, keys: list[str], conversion: Conversion) -> None:
    owners = file.owners()
    for key in keys:
        if "alpha" in key and key in owners and not owners[key][0].dtypes["alpha"].startswith(FLOATS):
            raise Refused("ValueError", f"{key!r} is no floating-point number")
    if not any("lora" in key for key in keys):
        raise Refused("ValueError", "'lora' is in no name")
    in_order = [owners[key][0] for key in keys if key in owners and owners[key][1] == "alpha"]
    if in_order and METADATA in file.metadata:
        raise Refused("ValueError", f"it takes alphas or {METADATA}, not both")
    hand_over(file, conversion, "transformer", (TEXT,))
    for component, handed in conversion.handed.items():
        prefix = f"{component or 'transformer'}."
        own = [m for m in in_order if m.stem.startswith(prefix)]
        handed.alphas = {m.stem: m.alpha for m in own if m.alpha is not None}
        handed.first_counts = True
        handed.pattern = as_written


def _down_up(file: FileFacts, keys: list[str], conversion: Conversion) -> None:
    if any(key.startswith("transformer.") for key in keys):
        kept = [m for m in file.modules.values() if m.stem.startswith("transformer.")]
        for module in kept:
            conversion.take(module) if module.in_diffusers_names else conversion.stray(module)
        others = [m for m in file.modules.values() if m not in kept]
        conversion.drop(others, "where some names begin with `transformer.`, it drops all others")
    elif any(key.startswith("lora_transformer_") for key in keys):
        _one_trainer(file, conversion)
    else:
        _kohya(file, conversion)


def _kohya(file: FileFacts, conversion: Conversion) -> None:
    texts: list[ModuleFacts] = []
    if not any(_is_kept(module) for module in file.modules.values()):
        raise Refused("ValueError", "it drops names that begin so, and there are no others")
    for module in file.modules.values():
        if not _is_kept(module):
            conversion.drop([module], "it drops names that begin so")
            continue
        extra = next((p for p in module.keys if p not in ("down", "up", "alpha", "diff_b", "dora_scale")), None)
        if extra is not None or not {"down", "up"} <= module.keys.keys() or module.suffix != ".lora_down.weight":
            raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
        if "diff_b" in module.keys:
            conversion.wrong[module.stem] = Finding("wrong", "it drops the change of the bias (diff_b)")
        if module.named.component:
            texts.append(module)
        else:
            _hand(module, conversion)
    for module in texts:
        if module.named.path == "text_projection":
            conversion.drop([module], "it drops text_projection")
        else:
            conversion.bake(module)
    if texts and not any(m.named.path.endswith((".out_proj", ".fc1", ".fc2")) for m in texts):
        raise Refused("ValueError", f"it cannot tell how the modules of {TEXT} are spelled")


def _is_kept(module: ModuleFacts) -> bool:
    if module.named.component:
        return module.prefix in ("lora_te_", "lora_te1_", "text_encoders.clip_l.transformer.")
    return module.prefix in ("lora_unet_", "diffusion_model.")


def _hand(module: ModuleFacts, conversion: Conversion) -> None:
    block = BLOCK.fullmatch(module.named.path)
    if block is None:
        if module.named.path in ("norm_out.linear", "proj_out") or module.alpha is None or module.alpha >= 0:
            conversion.drop([module], TOP)
        else:
            conversion.bake(module)
    elif module.in_diffusers_names or int(block[2]) >= (SINGLE if block[1] else DOUBLE):
        raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
    elif module.named.path.endswith("to_qkv_mlp_proj") and module.rows != 7 * HIDDEN:
        raise Refused("AssertionError", f"it takes {7 * HIDDEN} rows of {module.stem!r} for granted")
    else:
        conversion.bake(module)


def _one_trainer(file: FileFacts, conversion: Conversion) -> None:
    dropped = [m for m in file.modules.values() if m.prefix == "lora_unet_"]
    conversion.drop(dropped, "where some names begin with lora_transformer_, it drops those with lora_unet_")
    unknown = next((m for m in file.of("") if m not in dropped and not m.in_diffusers_names), None)
    if unknown is not None:
        raise Refused("NotImplementedError", f"it does not know {unknown.stem!r}")
    for module in file.modules.values():
        if module in dropped:
            continue
        if module.prefix not in ("lora_transformer_", "lora_te1_"):
            raise Refused("AssertionError", f"it does not expect {module.stem!r}")
        if not {"down", "up", "alpha"} <= module.keys.keys():
            raise Refused("KeyError", f"{module.stem!r} has no alpha, or one factor only")
        if not module.keys.keys() <= {"down", "up", "alpha", "dora_scale"} or module.named.path == "text_projection":
            raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
        block = BLOCK.fullmatch(module.named.path)
        if block is not None and ".attn." not in module.named.path:
            raise Refused("KeyError", f"in a block it knows attention only, and not {module.stem!r}")
        conversion.bake(module)


def _xlabs(file: FileFacts, conversion: Conversion) -> None:
    for module in file.modules.values():
        if "processor" not in module.stem or "alpha" in module.keys:
            conversion.wrong[module.stem] = Finding("unsure", "beside names of XLabs this is not followed here")
        else:
            conversion.take(module)


def _whole_peft_model(file: FileFacts, conversion: Conversion) -> None:
    there = {m.rest: m for m in file.modules.values() if m.prefix == "base_model.model." and m.suffix == PEFT}
    absent = next((name for name in WHOLE if name not in there), None)
    if absent is not None:
        raise Refused("KeyError", f"it needs every module of {DOUBLE} and {SINGLE} blocks, and {absent!r} is not there")
    known = set(WHOLE)
    more = next((m for m in file.modules.values() if m.rest not in known or not m.is_plain or "alpha" in m.keys), None)
    if more is not None:
        raise Refused("ValueError", f"it does not know what to do with {more.stem!r}")
    for module in file.modules.values():
        conversion.take(module)
