"""Projections that some code fuses into one weight, under the names that diffusers gives them."""

from __future__ import annotations

from fastlora.dialects.family import Fused, RowsOf
from fastlora.dialects.patterns import expanded

_PARTS = {
    "to_qkv": "{to_q,to_k,to_v}",
    "to_kv": "{to_k,to_v}",
    "to_added_qkv": "{add_q_proj,add_k_proj,add_v_proj}",
    "to_added_kv": "{add_k_proj,add_v_proj}",
}
FUSED_ENDS = frozenset((*_PARTS, "to_qkv_mlp_proj"))
PART_ENDS = frozenset("to_q to_k to_v add_q_proj add_k_proj add_v_proj proj_mlp".split())


def equal_rows(parts: int) -> RowsOf:
    """Parts of one length."""
    return lambda out, columns: (out // parts,) * parts if out % parts == 0 else None


def attention_and_mlp(out: int, columns: int) -> tuple[int, ...] | None:
    """Queries, keys and values as wide as the input, and all other rows. With nine times its width it is that of
    Flux.2, which is not made of parts."""
    return (columns, columns, columns, out - 3 * columns) if out > 3 * columns and out != 9 * columns else None


def grouped(out: int, columns: int) -> tuple[int, ...] | None:
    """Queries as wide as the input; keys and values share the rest."""
    rest = out - columns
    return (columns, rest // 2, rest // 2) if rest > 0 and rest % 2 == 0 else None


def fused(attention: str, *names: str, rows: RowsOf | None = None) -> dict[str, Fused]:
    """The fused projections of an attention: ``{pattern: parts}``. ``rows``: of unequal parts."""
    made = {}
    for name in names:
        parts = tuple(expanded(f"{attention}.{_PARTS[name]}"))
        made[f"{attention}.{name}"] = Fused(parts, rows or equal_rows(len(parts)))
    return made


def fused_with_mlp(block: str) -> dict[str, Fused]:
    """Queries, keys, values and the first layer of the MLP of a single block, the latter one level up."""
    parts = (*expanded(f"{block}.attn.{_PARTS['to_qkv']}"), f"{block}.proj_mlp")
    return {f"{block}.attn.to_qkv_mlp_proj": Fused(parts, attention_and_mlp)}


def same(*patterns: str) -> dict[str, str]:
    """Rows of modules that have one name in both spellings."""
    return {pattern: pattern for pattern in patterns}


def ours(*patterns: str) -> dict[str, str]:
    """Rows of modules that the original code does not have."""
    return dict.fromkeys(patterns, "")
