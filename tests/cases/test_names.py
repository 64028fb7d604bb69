"""One module under two names: what is merged is each module's own, under the names of one of the adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from builders import PREFIX, gaussian, make_config, peft_tensors, write_peft
from tolerances import ROUNDED32
from torch import Tensor

import fastlora as fl
from fastlora.core.data import Scaling
from fastlora.errors import InputError

RANK, SCALING = 3, 2.0
TEXT = {f"layers.{i}.self_attn.{end}": (12, 10) for i in range(2) for end in ("q_proj", "v_proj")}
VISION = {f"blocks.{i}.attn.qkv": (12, 10) for i in range(2)}
MLP = {f"layers.{i}.mlp.{end}": (10, 12) for i in range(2) for end in ("up_proj", "down_proj")}


def under(prefix: str, modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {prefix + m: shape for m, shape in modules.items()}


OLD = under("visual.", VISION) | under("model.", TEXT)
NEW = under("model.visual.", VISION) | under("model.language_model.", TEXT)


def factors(modules: Mapping[str, tuple[int, int]], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors by the place of a module in the list, whatever it is called."""
    rng = torch.Generator().manual_seed(seed)
    return {
        m: (torch.randn(n, RANK, generator=rng), torch.randn(RANK, k, generator=rng)) for m, (n, k) in modules.items()
    }


def adapter(folder: Path, modules: Mapping[str, tuple[int, int]], seed: int, prefix: str = PREFIX) -> Path:
    config = make_config(r=RANK, lora_alpha=RANK * SCALING, base_model_name_or_path="made-up/model")
    return write_peft(folder, peft_tensors(factors(modules, seed), prefix), config)


def dense(pair: tuple[Tensor, Tensor]) -> Tensor:
    return SCALING * (pair[0].double() @ pair[1].double())


def assert_sum(found: fl.Adapter, expected: Mapping[str, Tensor]) -> None:
    """``ΔW`` of every module in float64, to what the rounding of a float32 result leaves."""
    assert set(found.modules) == set(expected)
    for module, delta in expected.items():
        left, right = found.factors(module)
        error = (left.double() @ right.double() - delta).norm() / delta.norm()
        assert error <= 10 * ROUNDED32, module


RENAMED = {
    "parts of a model that was reorganised": (OLD, NEW),
    "text alone": (under("model.", TEXT), under("model.language_model.", TEXT)),
    "with a head in common": (
        {"lm_head": (20, 10)} | under("model.", TEXT),
        {"lm_head": (20, 10)} | under("model.language_model.", TEXT),
    ),
    "with a classifier in common": ({"score": (2, 10)} | under("model.", TEXT), {"score": (2, 10)} | under("", TEXT)),
    "a segment that moved": (
        under("language_model.model.", TEXT) | {"language_model.lm_head": (20, 10)} | under("vision_tower.", VISION),
        under("model.language_model.", TEXT) | {"lm_head": (20, 10)} | under("model.vision_tower.", VISION),
    ),
    "a bare model": (under("", TEXT), under("model.", TEXT)),
    "a name of its own around everything": (under("model.", TEXT), under("policy.model.", TEXT)),
    "an encoder that lost a level": (
        under("text_encoder.text_model.encoder.", TEXT),
        under("text_encoder.encoder.", TEXT),
    ),
}


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("case", RENAMED)
def test_two_namings_of_one_model(case: str, turned: bool, tmp_path: Path) -> None:
    one, two = RENAMED[case]
    paths = [adapter(tmp_path / "a", one, 1), adapter(tmp_path / "b", two, 2)]
    pool = fl.Pool.load(paths[::-1] if turned else paths)
    merged = fl.merge(pool, {"a": 0.5, "b": 0.5}, rank=2 * RANK)
    names = two if turned else one
    first, second = factors(one, 1).values(), factors(two, 2).values()
    total = [0.5 * dense(x) + 0.5 * dense(y) for x, y in zip(first, second, strict=True)]
    assert_sum(merged, dict(zip(names, total, strict=True)))
    assert any("was saved from a differently wrapped model" in note for note in pool.notices)


@pytest.mark.parametrize("case", RENAMED)
def test_an_adapter_is_itself_under_another_naming(case: str, tmp_path: Path) -> None:
    one, two = RENAMED[case]
    a, b = fl.load(adapter(tmp_path / "a", one, 1)), fl.load(adapter(tmp_path / "b", two, 1))
    pool = fl.Pool([a, b])
    compared = fl.overlap(pool, modules=True)
    assert set(compared.modules) == set(one)
    for cosine, subspace in compared.modules.values():
        assert float(cosine[0, 1]) == pytest.approx(1.0) and float(subspace[0, 1]) == pytest.approx(1.0)
    parts = fl.decompose(pool)
    assert {row.module: row.shared for row in parts.reports[0].rows} == {m: min(RANK, *n) for m, n in one.items()}
    nothing = a - b
    assert nothing.modules == a.modules and any("differently wrapped" in note for note in nothing.notes)
    difference = fl.compose("a - b", {"a": a, "b": b})
    still = fl.modulate(a, fl.dipm.shift(a, b, 0.5))
    means = [fl.add([a, b], [0.5, 0.5], semantics=s) for s in ("exact", "pem")]
    for module in one:
        size = float(a.delta(module).norm())
        for zero in (nothing, difference):
            assert float(zero.delta(module).norm()) <= ROUNDED32 * 10 * size
        for same in (still, *means):
            assert float((same.delta(module) - a.delta(module)).norm()) <= ROUNDED32 * 10 * size


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_three_adapters_plays_no_part(order: tuple[int, ...], tmp_path: Path) -> None:
    given = [OLD, NEW, under("model.language_model.", TEXT)]
    paths = [adapter(tmp_path / "abc"[i], given[i], i) for i in order]
    pool = fl.Pool.load(paths)
    assert len(pool.modules) == len(OLD) and set(pool.modules) in (set(OLD), set(NEW))
    merged = fl.merge(pool, rank=3 * RANK)
    by_place = [list(factors(g, i).values()) for i, g in enumerate(given)]
    names = OLD if set(pool.modules) == set(OLD) else NEW
    total = {m: dense(by_place[0][k]) + dense(by_place[1][k]) for k, m in enumerate(names)}
    for k, module in enumerate(list(names)[len(VISION) :]):
        total[module] = total[module] + dense(by_place[2][k])
    assert_sum(merged, total)


def test_names_that_no_adapter_has_are_not_made(tmp_path: Path) -> None:
    """The first adapter has a part of the model alone: the names of the second have room for all."""
    part = adapter(tmp_path / "a", under("model.language_model.", TEXT), 1)
    whole = adapter(tmp_path / "b", OLD | {"lm_head": (20, 10)}, 2)
    assert set(fl.Pool.load([part, whole]).modules) == {*OLD, "lm_head"}


def test_parts_that_only_one_adapter_has_follow_their_prefix(tmp_path: Path) -> None:
    one = under("model.", TEXT | {k: v for k, v in MLP.items() if "up" in k})
    two = under("model.language_model.", TEXT | {k: v for k, v in MLP.items() if "down" in k})
    pool = fl.Pool.load([adapter(tmp_path / "a", one, 1), adapter(tmp_path / "b", two, 2)])
    assert set(pool.modules) == set(under("model.", TEXT | MLP))


BODY = under("model.", TEXT)
APART = {
    "two towers": (under("text_model.encoder.", TEXT), under("vision_model.encoder.", TEXT)),
    "a text and a vision tower": (BODY, under("model.visual.", TEXT)),
    "encoder and decoder": (under("model.encoder.", TEXT), under("model.decoder.", TEXT)),
    "the second of two": (under("text_encoder.", TEXT), under("text_encoder_2.", TEXT)),
    "other kinds of blocks": (BODY, {m.replace("layers", "blocks"): s for m, s in BODY.items()}),
    "another attention": (BODY, {m.replace("self", "cross"): s for m, s in BODY.items()}),
}


@pytest.mark.parametrize("case", APART)
def test_what_may_be_two_is_not_made_one_and_is_told(case: str, tmp_path: Path) -> None:
    head = {"lm_head": (20, 10)}
    one, two = APART[case]
    pool = fl.Pool.load([adapter(tmp_path / "a", one | head, 1), adapter(tmp_path / "b", two | head, 2)])
    assert set(pool.modules) == {*one, *two, *head}
    [notice] = pool.notices
    assert next(iter(one)) in notice and next(iter(two)) in notice and "--map OLD=NEW" in notice


def test_vectors_and_task_vectors_are_aligned_too() -> None:
    """``l = 1 + Σ w(l − 1)`` of (IA)³, and the sum of changes of whole models, by the same rules for names."""
    rows = {m: gaussian(n, 1, seed=i) for i, (m, (n, _)) in enumerate(OLD.items())}
    old = fl.IA3("old", {m: Scaling(v, feedforward=False) for m, v in rows.items()})
    new = fl.IA3("new", {m: Scaling(v, feedforward=False) for m, v in zip(NEW, rows.values(), strict=True)})
    for total, names in ((old + new, OLD), (new + old, NEW), (fl.compose("a + b", {"a": old, "b": new}), OLD)):
        assert isinstance(total, fl.IA3) and set(total.modules) == set(names) and total.notes
        for module, vector in zip(names, rows.values(), strict=True):
            assert torch.equal(total.vector(module), (2.0 * vector.double() - 1.0).flatten())
    plain = fl.TaskVector("plain", {f"{m}.weight": torch.randn(s) for m, s in OLD.items()})
    wrapped = fl.TaskVector("wrapped", {f"module.{p}": d for p, d in plain.deltas.items()})
    for nothing in (plain - wrapped, wrapped - plain):
        assert set(nothing.deltas) == set(plain.deltas) and nothing.norm == 0.0 and nothing.notes


def test_other_shapes_are_other_modules(tmp_path: Path) -> None:
    wider = {m: (n + 1, k) for m, (n, k) in TEXT.items()}
    a, b = adapter(tmp_path / "a", under("model.", TEXT), 1), adapter(tmp_path / "b", under("", wider), 2)
    with pytest.raises(InputError, match="no module in common"):
        fl.Pool.load([a, b])


def test_a_bare_name_that_two_towers_could_have_is_refused(tmp_path: Path) -> None:
    both = under("text.", TEXT) | under("image.", TEXT)
    a, b = adapter(tmp_path / "a", both, 1), adapter(tmp_path / "b", TEXT, 2)
    with pytest.raises(InputError, match=r"no module in common.*--map"):
        fl.Pool.load([a, b])
    settled = fl.Pool.load([a, b], rename={"layers": "image.layers"})
    assert set(settled.modules) == set(both)


def test_rename_settles_names() -> None:
    a, b = (fl.Adapter.from_tensors(factors(m, 1), name=n) for n, m in (("a", {"x.q": (4, 5)}), ("b", {"y.q": (4, 5)})))
    with pytest.raises(InputError, match="no module in common"):
        fl.Pool([a, b])
    assert fl.Pool([a, b], rename={"y": "x"}).modules == ["x.q"]
    assert fl.Pool([a, b], rename={"y.q": "x.q"}).modules == ["x.q"]
    assert fl.Pool([a, b], rename={"x": "", "y": ""}).modules == ["q"]
    assert fl.Pool([a, b], rename={"x": "x", "y": "y"}).modules == ["x.q", "y.q"]
    assert fl.Pool([a, b], rename={"": "z", "y": "z.x"}).modules == ["z.x.q"]
    for wrong in (["y=x"], {"y": 1}, {"y": "x\x1b"}, {"y": "x..z"}):
        with pytest.raises(InputError, match="rename"):
            fl.Pool([a, b], rename=wrong)  # type: ignore[arg-type]
    for useless in ({"z": "x"}, {"y.": "x", "q": "p"}, {"x.q.w": "x"}):
        with pytest.raises(InputError, match="no name that could change"):
            fl.Pool([a, b], rename=useless)
    two = fl.Adapter.from_tensors(factors({"x.q": (4, 5), "y.q": (4, 5)}, 1), name="two")
    with pytest.raises(InputError, match=r"'x.q' and 'y.q' would both be called 'x.q'"):
        fl.Pool([two], rename={"y": "x"})


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled by layer": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "in parallel": lambda key: f"module.{key}",
    "in parallel inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "in parallel twice": lambda key: f"module.module.{key}",
    "twice by PEFT": lambda key: PREFIX + key,
    "sharded": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "all at once": lambda key: "_orig_mod.module." + key.replace(".self", "._fsdp_wrapped_module._orig_mod.self"),
    "PEFT inside": lambda key: key.replace(PREFIX + "model.", f"{PREFIX}language_model.base_model.model.model."),
}


def rewritten(folder: Path, source: Path, change: Callable[[str], str]) -> Path:
    from safetensors.torch import load_file

    tensors = load_file(source / "adapter_model.safetensors")
    return write_peft(
        folder, {change(k): t for k, t in tensors.items()}, make_config(r=RANK, lora_alpha=RANK * SCALING)
    )


@pytest.mark.parametrize("case", WRAPPED)
def test_segments_of_wrappers_are_no_names(case: str, tmp_path: Path) -> None:
    modules = under("model.", TEXT)
    plain = adapter(tmp_path / "plain", modules, 1)
    wrapped = rewritten(tmp_path / "wrapped", adapter(tmp_path / "b", modules, 2), WRAPPED[case])
    alone = fl.load(wrapped)
    inside = case == "PEFT inside"
    assert set(alone.modules) == set(under("language_model.model.", TEXT) if inside else modules)
    assert len(alone.notes) == 1 and "left there by a wrapper" in alone.notes[0]
    pairs = zip(factors(modules, 1).values(), factors(modules, 2).values(), strict=True)
    total = [dense(x) + dense(y) for x, y in pairs]
    for paths in ([plain, wrapped], [wrapped, plain]):
        merged = fl.merge(fl.Pool.load(paths), rank=2 * RANK)
        names = merged.modules if inside else list(modules)
        assert_sum(merged, dict(zip(names, total, strict=True)))


def test_a_part_called_module_is_a_wrapper_where_others_do_not_have_it(tmp_path: Path) -> None:
    modules = under("model.", TEXT)
    plain, other = (adapter(tmp_path / n, modules, i) for i, n in enumerate("ab"))
    inner = [
        rewritten(tmp_path / f"{p.name} inner", p, lambda key: key.replace(".self", ".module.self"))
        for p in (plain, other)
    ]
    alone = fl.load(inner[0])
    assert all(".module." in m for m in alone.modules) and "'module' in " in alone.notes[0]
    assert all(".module." in m for m in fl.Pool.load(inner).modules)
    for paths in ([inner[0], other], [other, inner[0]]):
        pool = fl.Pool.load(paths)
        assert set(pool.modules) == set(modules)
        assert any("'module' inside its names was left there by a wrapper" in n for n in pool.notices)


def test_a_part_called_module_stays_where_the_configuration_names_it(tmp_path: Path) -> None:
    modules = under("module.", TEXT)
    config = make_config(r=RANK, target_modules=[f"module.layers.{i}.self_attn.q_proj" for i in range(2)])
    kept = fl.load(write_peft(tmp_path / "a", peft_tensors(factors(modules, 1)), config))
    assert set(kept.modules) == set(modules) and not kept.notes


@pytest.mark.parametrize("start", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_in_memory_may_be_those_of_a_wrapped_model(start: str) -> None:
    modules = under("model.", TEXT)
    a = fl.Adapter.from_tensors(factors(under(start, modules), 1), name="a")
    b = fl.Adapter.from_tensors(factors(modules, 2), name="b")
    for pool in (fl.Pool([a, b]), fl.Pool([b, a])):
        assert set(pool.modules) == set(modules) and pool.notices
    assert set((a + b).modules) == set(modules)


def test_a_leading_part_called_module_that_not_all_names_have_is_kept_and_told(tmp_path: Path) -> None:
    tensors = peft_tensors(factors(under("module.", TEXT) | {"head": (4, 5)}, 1))
    found = fl.load(write_peft(tmp_path / "a", tensors, make_config(r=RANK)))
    assert set(found.modules) == {*under("module.", TEXT), "head"} and "'module' in " in found.notes[0]


def test_keys_that_become_one_are_refused(tmp_path: Path) -> None:
    tensors = peft_tensors(factors(under("model.", TEXT), 1))
    first = next(iter(tensors))
    path = write_peft(tmp_path / "a", tensors | {f"_orig_mod.{first}": tensors[first].clone()}, make_config(r=RANK))
    with pytest.raises(InputError, match=rf"_orig_mod.{first}.* are the same factor"):
        fl.load(path)


def test_patterns_may_name_wrappers(tmp_path: Path) -> None:
    """A pattern that was written for the wrapped model holds for the modules that it matched there."""
    modules = under("model.", TEXT)
    source = adapter(tmp_path / "a", modules, 1)
    path = rewritten(tmp_path / "b", source, WRAPPED["sharded"])
    pattern = {r"^model\.layers\.0\._fsdp_wrapped_module\.self_attn\.q_proj": 9.0, "1.self_attn.v_proj": 6.0}
    config = make_config(r=RANK, lora_alpha=3, alpha_pattern=pattern)
    write_peft(path, {WRAPPED["sharded"](k): t for k, t in peft_tensors(factors(modules, 1)).items()}, config)
    scalings = {m: u.scaling for m, u in fl.load(path).updates.items()}
    assert scalings == dict(zip(modules, (3.0, 1.0, 1.0, 2.0), strict=True))


def test_parameters_may_be_named_with_wrappers(tmp_path: Path) -> None:
    """Experts that were adapted inside a wrapper: their parameter is the model's own."""
    start = f"{PREFIX}model.layers.0._fsdp_wrapped_module.mlp.experts."
    tensors = {f"{start}lora_A.weight": gaussian(8, 6, seed=1), f"{start}lora_B.weight": gaussian(5, 8, seed=2)}
    for target in ("mlp.experts.down_proj", "model.layers.0._fsdp_wrapped_module.mlp.experts.down_proj"):
        path = write_peft(tmp_path / target[:3], tensors, make_config(r=4, target_parameters=[target]))
        assert fl.load(path).modules == [f"model.layers.0.mlp.experts.down_proj[{e}]" for e in range(2)]
