"""Which parameters take part in extraction: patterns."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian

import fastlora as fl

NAMES = [
    f"model.layers.{i}.{part}.weight"
    for i in (1, 10)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]
NAMES += ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
BASE = {n: gaussian(6, 6, seed=i) if "norm" not in n else torch.ones(6) for i, n in enumerate(NAMES)}
TUNED = {n: t + gaussian(*t.shape, seed=100 + i) for i, (n, t) in enumerate(BASE.items())}

CHOSEN = {
    "q_proj": [0, 3],
    "self_attn": [0, 1, 3, 4],
    "layers.1": [0, 1, 2],
    "layers.1.*": [0, 1, 2],
    "layers.*.mlp": [2, 5],
    "*_proj": [0, 1, 2, 3, 4, 5],
    "?_proj": [0, 1, 3, 4],
    "model.norm.weight": [8],
    "*norm*": [8],
    r"layers\.(1|2)\.mlp": [2],
    r".*\.1\..*": [0, 1, 2],
    "lm_head|embed_tokens": [6, 7],
}


@pytest.mark.parametrize("pattern", CHOSEN)
def test_patterns(pattern: str) -> None:
    chosen = {NAMES[i] for i in CHOSEN[pattern]}
    assert set(fl.task_vector(BASE, TUNED, include=[pattern])) == chosen
    assert set(fl.task_vector(BASE, TUNED, exclude=[pattern])) == set(NAMES) - chosen
    whole = fl.task_vector(BASE, TUNED, whole=[pattern])
    assert set(whole.values) == chosen and set(whole) == set(NAMES) - chosen
    assert all(torch.equal(whole.values[n], TUNED[n]) for n in chosen)


def test_several_patterns() -> None:
    vector = fl.task_vector(BASE, TUNED, "x", include=["self_attn", "lm_head"], exclude=["k_proj"], whole=["lm_head"])
    assert set(vector) == {NAMES[0], NAMES[3]} and set(vector.values) == {"lm_head.weight"}
    adapter = vector.extract(rank=6)
    assert set(adapter.updates) == {n.removesuffix(".weight") for n in (NAMES[0], NAMES[3])}
    assert adapter.base.modules_to_save == ("lm_head",)
    assert "changed and are left out, as asked for" in adapter.notes[0]
    kept = float(sum((TUNED[n] - BASE[n]).double().square().sum() for n in vector))
    everything = kept + float(
        sum((TUNED[n] - BASE[n]).double().square().sum() for n in set(NAMES) - set(vector) - {"lm_head.weight"})
    )
    assert adapter.provenance["retained_energy"] == pytest.approx(kept / everything)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_porj", "matches no parameter of the models; there are q_proj"),
        ("", "is no pattern"),
        ("a(b", "is no pattern"),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude", "whole"])
def test_what_is_no_pattern(option: str, pattern: str, message: str) -> None:
    with pytest.raises(fl.InputError, match=f"{option}='?.*{message}"):
        fl.task_vector(BASE, TUNED, **{option: [pattern]})  # type: ignore[arg-type]
    with pytest.raises(fl.InputError, match=f"{option} must be a list of patterns"):
        fl.task_vector(BASE, TUNED, **{option: "lm_head"})  # type: ignore[arg-type]


def test_whole_parameters_are_no_change() -> None:
    vector = fl.task_vector(BASE, TUNED, "x", whole=["lm_head"])
    assert torch.equal(vector.apply(BASE)["lm_head.weight"], TUNED["lm_head.weight"])
    with pytest.raises(fl.InputError, match=r"keeps lm_head\.weight whole, which cannot be added or scaled"):
        _ = 0.5 * vector
    with pytest.raises(fl.OutputError, match=r"keeps lm_head\.weight whole, which is no change"):
        vector.save("x.safetensors")
    with pytest.raises(fl.InputError, match=r"the fine-tune .* has no extra\.weight"):
        fl.task_vector({**BASE, "extra.weight": torch.ones(2, 2)}, TUNED, whole=["extra"])
