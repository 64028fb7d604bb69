"""Fused projections of image models in one adapter against their parts in another: exact, or refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from builders import gaussian
from tolerances import SUMS32
from torch import Tensor

import fastlora as fl

HIDDEN = 16
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0"
# A fused projection and its parts, with their rows, in order.
WHOLES: Mapping[str, tuple[int, tuple[tuple[str, int], ...]]] = {
    f"{DOUBLE}.to_qkv": (HIDDEN, tuple((f"{DOUBLE}.to_{x}", HIDDEN) for x in "qkv")),
    f"{DOUBLE}.to_added_qkv": (HIDDEN, tuple((f"{DOUBLE}.add_{x}_proj", HIDDEN) for x in "qkv")),
    f"{SINGLE}.attn.to_qkv_mlp_proj": (
        HIDDEN,
        (*((f"{SINGLE}.attn.to_{x}", HIDDEN) for x in "qkv"), (f"{SINGLE}.proj_mlp", 4 * HIDDEN)),
    ),
    f"{SINGLE}.attn.to_qkv": (HIDDEN, tuple((f"{SINGLE}.attn.to_{x}", HIDDEN) for x in "qkv")),
    "layers.3.attention.to_qkv": (HIDDEN, tuple((f"layers.3.attention.to_{x}", HIDDEN) for x in "qkv")),
    # Three queries share a key in Lumina 2.
    "layers.3.attn.to_qkv": (24, (("layers.3.attn.to_q", 24), ("layers.3.attn.to_k", 8), ("layers.3.attn.to_v", 8))),
    f"{UNET}.attn2.to_kv": (24, ((f"{UNET}.attn2.to_k", HIDDEN), (f"{UNET}.attn2.to_v", HIDDEN))),
    "transformer_2.blocks.1.attn1.to_qkv": (
        HIDDEN,
        tuple((f"transformer_2.blocks.1.attn1.to_{x}", HIDDEN) for x in "qkv"),
    ),
}
SEEDS = itertools.count(1)


def adapter(shapes: Mapping[str, tuple[int, int]], rank: int = 3, name: str = "") -> fl.Adapter:
    """An adapter with such modules, of random factors."""
    seed = next(SEEDS)
    pairs = {
        module: (gaussian(out, rank, seed=100 * seed + 2 * i), gaussian(rank, columns, seed=100 * seed + 2 * i + 1))
        for i, (module, (out, columns)) in enumerate(shapes.items())
    }
    return fl.Adapter.from_tensors({m: (*pair, 2.0) for m, pair in pairs.items()}, name=name or f"a{seed}")


def fused(whole: str) -> fl.Adapter:
    columns, parts = WHOLES[whole]
    return adapter({whole: (sum(rows for _, rows in parts), columns)})


def split(whole: str, chosen: Sequence[int] | None = None) -> fl.Adapter:
    columns, parts = WHOLES[whole]
    kept = [parts[i] for i in (range(len(parts)) if chosen is None else chosen)]
    return adapter({part: (rows, columns) for part, rows in kept})


def dense(found: fl.Adapter, whole: str) -> Tensor:
    """What an adapter in any form says of the fused weight: rows of parts, or of several parts, in their place."""
    columns, parts = WHOLES[whole]
    total = torch.zeros(sum(rows for _, rows in parts), columns, dtype=torch.float64)
    starts = dict(zip((p for p, _ in parts), itertools.accumulate((r for _, r in parts), initial=0), strict=False))
    for module in found.modules:
        delta = found.delta(module).double()
        first = 0 if module == whole or module.endswith("to_qkv") else starts[module]
        total[first : first + len(delta)] += delta
    return total


def assert_sum(found: fl.Adapter, whole: str, terms: Sequence[fl.Adapter]) -> None:
    expected = sum(dense(term, whole) for term in terms)
    torch.testing.assert_close(dense(found, whole), expected, rtol=0, atol=SUMS32 * float(expected.abs().max()))


@pytest.mark.parametrize("whole", WHOLES)
def test_a_fused_projection_and_its_parts(whole: str) -> None:
    parts = WHOLES[whole][1]
    for chosen in (None, [0], [len(parts) - 1], [0, len(parts) - 1]):
        a, b = fused(whole), split(whole, chosen)
        for order in ((a, b), (b, a)):
            found = fl.merge(fl.Pool(list(order)), {a.name: 1.0, b.name: 1.0}, method="cat")
            assert_sum(found, whole, [a, b])
            assert (whole in found.modules) == (order[0] is a)
            assert len({*found.modules} & {p for p, _ in parts}) == (0 if order[0] is a else len(parts))


def test_the_form_of_the_first_is_told() -> None:
    whole = f"{SINGLE}.attn.to_qkv_mlp_proj"
    a, b = fused(whole), split(whole)
    assert f"take part as updates of {whole}" in " ".join(fl.Pool([a, b]).notices)
    assert f"takes part as its rows {SINGLE}.attn.to_q" in " ".join(fl.Pool([b, a]).notices)


def test_queries_keys_and_values_in_what_has_the_mlp_too() -> None:
    """One trainer of Flux fuses three projections of a single block, another four."""
    whole, three = f"{SINGLE}.attn.to_qkv_mlp_proj", f"{SINGLE}.attn.to_qkv"
    a, b, c = fused(whole), fused(three), split(whole, [1, 3])
    for order in itertools.permutations((a, b, c)):
        found = fl.merge(fl.Pool(list(order)), dict.fromkeys((a.name, b.name, c.name), 1.0), method="cat")
        assert_sum(found, whole, [a, b, c])
        if order[0] is not c:
            leaves = {p for p, _ in WHOLES[whole][1][:3]}
            assert not leaves & {*found.modules}


def test_every_way_of_combining() -> None:
    whole = f"{SINGLE}.attn.to_qkv_mlp_proj"
    a, b = fused(whole), split(whole)
    assert_sum(a + b, whole, [a, b])
    assert_sum(b + a, whole, [a, b])
    one, two = dense(a, whole), dense(b, whole)
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    for pool in (fl.Pool([a, b]), fl.Pool([b, a])):
        assert float(fl.overlap(pool).cosine[0, 1]) == pytest.approx(cosine, abs=SUMS32)
        parts = fl.decompose(pool, threshold=0.05)
        for own in (a, b):
            assert_sum(parts.shared_of(own.name) + parts.unique_of(own.name), whole, [own])


REFUSED = {
    "other columns": (
        {f"{DOUBLE}.to_qkv": (48, 16)},
        {f"{DOUBLE}.to_q": (16, 24)},
        r"adapter 'second': .*to_q.* are one weight in parts and fused, but their shapes do not fit",
    ),
    "other rows": (
        {f"{DOUBLE}.to_qkv": (48, 16)},
        {f"{DOUBLE}.to_q": (24, 16)},
        r"adapter 'second': .*are one weight in parts and fused",
    ),
    "rows of no third": (
        {f"{DOUBLE}.to_q": (16, 16)},
        {f"{DOUBLE}.to_qkv": (50, 16)},
        r"adapter 'second': .*are one weight in parts and fused",
    ),
    "Flux.2 has no parts": (
        {f"{SINGLE}.attn.to_qkv_mlp_proj": (144, 16)},
        {f"{SINGLE}.attn.to_k": (16, 16)},
        r"adapter 'second': .*are one weight in parts and fused",
    ),
    "both in one": (
        {f"{DOUBLE}.to_out.0": (16, 16)},
        {f"{DOUBLE}.to_qkv": (48, 16), f"{DOUBLE}.to_k": (16, 16)},
        r"adapter 'second' has both .*to_qkv and .*to_k",
    ),
    "names of no family": (
        {"stages.0.attn.to_qkv": (48, 16)},
        {"stages.0.attn.to_k": (16, 16)},
        r"one weight in two forms, fused and in parts, whose rows may be in different orders",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unclear_is_refused(case: str) -> None:
    first, second, message = REFUSED[case]
    with pytest.raises(fl.InputError, match=message):
        fl.Pool([adapter(first, name="first"), adapter(second, name="second")])


def test_parts_that_are_a_model_of_their_own_stay() -> None:
    """Text and picture have projections apart, and other blocks are other weights."""
    a = adapter({f"{DOUBLE}.to_qkv": (48, 16), f"{SINGLE}.proj_mlp": (64, 16)})
    b = adapter({f"{DOUBLE}.add_q_proj": (16, 16), "transformer_blocks.1.attn.to_q": (16, 16)})
    pool = fl.Pool([a, b])
    assert {m for own in pool.adapters for m in own.modules} == {*a.modules, *b.modules}
