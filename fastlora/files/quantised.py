"""Weights that are stored as codes: scaled float8 is multiplied out, other ways of quantising are told by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.errors import InputError

CODES = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "SCB": "bitsandbytes, 8 bit",
    "absmax": "bitsandbytes, 4 bit",
    "quant_map": "bitsandbytes, 4 bit",
    "nested_absmax": "bitsandbytes, 4 bit",
    "nested_quant_map": "bitsandbytes, 4 bit",
    "weight_packed": "compressed-tensors, packed",
    "weight_zero_point": "compressed-tensors, whole numbers",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "centroids": "VPTQ",
    "weight_scale_2": "ModelOpt, 4 bit",
}
"""Last names of tensors that stand beside codes, or are codes."""
PACKED = re.compile(r"(.+)_blocks")
"""MXFP4: ``<parameter>_blocks`` beside ``<parameter>_scales``."""
QUANT_STATE = re.compile(r"(.+)\.quant_state\.\w+")

AFTER = ("_scale_inv", "_scale", ".scale_inv", ".scale", "_scales")
"""What follows the name of a parameter in the name of its scale."""
INSTEAD = ("scale_weight", "weight_scale_inv", "weight_scale", "scale_inv", "scale", "weight_scales")
"""What stands in the place of ``weight``."""
ACTIVATIONS = re.compile(
    r"(.+\.)?((input|output|activation|act|k|v|q|kv|k_proj|v_proj)_(scale|scales|scale_inv)|scale_(input|output)|"
    r"input_amax|scaled_fp8|input_zero_point)"
)
"""Scales of what flows through a model: no part of its weights."""
SCALE_LIKE = re.compile(r".*(scale|amax)\w*")
FLOAT8 = tuple(d for n in dir(torch) if n.startswith("float8_e") and isinstance(d := getattr(torch, n), torch.dtype))
EXPONENTS = getattr(torch, "float8_e8m0fnu", None)
"""A dtype of scales: powers of two."""
OUT = "load it with its library, save it in bfloat16 (`dequantize` of transformers), and pass that"


@dataclass(frozen=True, slots=True)
class Coding:
    """How parameters are stored: ``scales`` of those in float8, by parameter; ``refused``: why the parameters of a
    module cannot be read, by module; ``companions``: tensors that are no parameters."""

    scales: Mapping[str, Tensor] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()

    def refusal(self, parameter: str) -> str | None:
        """Why a parameter cannot be read, if it cannot."""
        if not self.refused:
            return None
        parts = parameter.split(".")
        paths = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((self.refused[path] for path in paths if path in self.refused), None)


def find_coding(state: Mapping[str, Tensor], method: str | None) -> Coding:
    """How the tensors of a model are stored. ``method``: what its configuration calls the quantisation."""
    scales: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    companions: set[str] = set()
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        packed = PACKED.fullmatch(name)
        hidden = QUANT_STATE.fullmatch(name)
        if last in CODES:
            owner = module.removesuffix(".weight")
            refused[owner] = CODES[last]
        elif hidden is not None:
            refused[hidden[1].removesuffix(".weight")] = CODES["absmax"]
        elif packed is not None and f"{packed[1]}_scales" in state and tensor.dtype == torch.uint8:
            refused.update(dict.fromkeys((packed[1], name, f"{packed[1]}_scales"), "MXFP4"))
        elif ACTIVATIONS.fullmatch(name):
            companions.add(name)
        elif _may_be_codes(name, tensor):
            found = _scale_names(name, state)
            companions.update(found)
            if tensor.dtype in FLOAT8 and len(found) == 1 and _is_scale(state[found[0]]):
                scales[name] = state[found[0]]
            elif tensor.dtype in FLOAT8 and not (found or method or _unknown_scale(name, state) or _fills(tensor)):
                continue  # rounded to float8 and no more
            elif tensor.dtype in FLOAT8 or found or not tensor.is_floating_point():
                why = _why(tensor, found or _unknown_scale(name, state), method)
                refused.setdefault(name.removesuffix(".weight"), why)
    orphans = [n for n in state if n not in companions and re.fullmatch(r".+\.(weight_scale\w*|scale_weight)", n)]
    for orphan in orphans:
        module, _, last = orphan.rpartition(".")
        refused.setdefault(module, f"{last} without its weight")
    return Coding(scales, refused, frozenset(companions))


def _may_be_codes(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight, which can be quantised: float8, whole numbers, or anything with a scale beside."""
    if tensor.dtype in FLOAT8:
        return not SCALE_LIKE.fullmatch(name.rpartition(".")[2])
    return tensor.dtype != torch.bool and tensor.dim() >= 2 and (name.endswith(".weight") or tensor.dim() == 3)


def _scale_names(name: str, state: Mapping[str, Tensor]) -> list[str]:
    names = [name + end for end in AFTER]
    if name.endswith(".weight"):
        module = name.removesuffix("weight")
        only_float8 = ("scale", "scale_inv")  # elsewhere these are parameters of their own
        names += [module + own for own in INSTEAD if own not in only_float8 or state[name].dtype in FLOAT8]
    return [n for n in dict.fromkeys(names) if n in state]


def _unknown_scale(name: str, state: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the same module that may be scales of it, under another name."""
    module = name.rpartition(".")[0] + "."
    return [
        n
        for n in state
        if n != name
        and n.startswith(module)
        and SCALE_LIKE.fullmatch(n.removeprefix(module))
        and not ACTIVATIONS.fullmatch(n)
    ]


def _fills(weight: Tensor) -> bool:
    """Whether entries come near the largest number of the dtype: weights do so only when they were scaled to it."""
    return float(weight.float().abs().max()) > 0.25 * torch.finfo(weight.dtype).max if weight.numel() else False


def _is_scale(scale: Tensor) -> bool:
    return scale.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, EXPONENTS)


def _why(tensor: Tensor, found: list[str], method: str | None) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    beside = f" with {', '.join(n.rpartition('.')[2] for n in found)} beside it" if found else ""
    return f"{method or 'an unknown way'}, {kind}{beside or ' without a scale'}"


def scaled(name: str, weight: Tensor, scale: Tensor, blocks: tuple[int, int] | None) -> Tensor:
    """``weight · scale`` in float64: one scale for all, for each row or column, or for each block of the last two
    dimensions, whose sizes are ``blocks`` or follow from the shapes.

    Raises :class:`InputError` where the shapes leave open which scale belongs to what.
    """
    values, scales = weight.double(), scale.double()
    if scales.numel() == 1:
        return values * scales.reshape(())
    if scales.dim() == 1 and scales.shape[0] == weight.shape[0] and weight.dim() == 2:
        scales = scales[:, None]
    if scales.dim() != weight.dim():
        raise _ambiguous(name, weight, scale)
    for dim, (length, count) in enumerate(zip(weight.shape, scales.shape, strict=True)):
        if count in (1, length):
            continue
        given = blocks[dim - weight.dim() + 2] if blocks and dim >= weight.dim() - 2 else None
        size = _block_size(length, count, given)
        if size is None:
            raise _ambiguous(name, weight, scale)
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, length)
    return values * scales


def _block_size(length: int, count: int, given: int | None) -> int | None:
    """How many entries share a scale; ``None`` where that is not clear."""
    if given is not None:
        return given if -(-length // given) == count else None
    sizes: set[int] = {2**k for k in range(3, 13) if -(-length // 2**k) == count}
    if length % count == 0:
        sizes.add(length // count)
    return sizes.pop() if len(sizes) == 1 else None


def _ambiguous(name: str, weight: Tensor, scale: Tensor) -> InputError:
    return InputError(
        f"{name} is {list(weight.shape)} in float8 and its scale {list(scale.shape)}, and nothing says which entries "
        f"share a scale ('weight_block_size' of config.json would); {OUT}"
    )


def quantised_error(where: str, names: Iterable[tuple[str, str]]) -> InputError:
    """The refusal of parameters that are codes: ``(parameter, how)``."""
    found = list(names)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return InputError(
        f"{where} is quantised ({found[0][1]}): {found[0][0]}{more} holds codes, whose difference means nothing; {OUT}"
    )
