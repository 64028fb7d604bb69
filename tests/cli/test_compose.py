"""``fastlora compose`` as a user runs it, and ``inspect`` and ``merge`` on what is not LoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_adapter, shared_pool
from command import ADAPTERS, DATA, done, places, run, tree
from safetensors.torch import load_file, save_file
from tolerances import FLOAT32

import fastlora as fl

MOVIE_A, MOVIE_B, SPAM, TREC = (ADAPTERS / n for n in ("movie_a", "movie_b", "spam", "trec_r16"))
IA3_A, IA3_B = DATA / "movie_ia3_a", DATA / "movie_ia3_b"
EXPRESSION = "0.6*movie_a + 0.4*movie_b - 0.3*unique(toxic | movie_a, trec)"


def refused(*arguments: object, cwd: Path) -> str:
    """The message of a command that must be refused: exit code 2, nothing printed, nothing changed."""
    there = tree(cwd)
    found = run(*arguments, cwd=cwd)
    assert found.code == 2, found.err or found.out
    assert found.out == "" and found.err.startswith("error: ") and "Traceback" not in found.err
    assert tree(cwd) == there
    return found.err.removeprefix("error: ").rstrip("\n")


def test_the_documented_example(tmp_path: Path) -> None:
    named = [f"movie_a={MOVIE_A}", f"movie_b={MOVIE_B}", f"toxic={SPAM}", f"trec={TREC}"]
    found = done("compose", EXPRESSION, *named, "--out", "out", cwd=tmp_path)
    assert found.out.startswith("out: 18 modules, rank 24") and found.err == ""
    a, b, toxic, trec = (fl.load(p, n) for p, n in ((MOVIE_A, "a"), (MOVIE_B, "b"), (SPAM, "toxic"), (TREC, "trec")))
    unique = fl.decompose(fl.Pool([toxic, a, trec]), mode="iterative", target="toxic").unique_of("toxic")
    expected = 0.6 * a + 0.4 * b - 0.3 * unique
    got = fl.load(tmp_path / "out")
    for module in expected.modules:
        value = expected.delta(module)
        assert (got.delta(module) - value).norm() <= FLOAT32 * value.norm()
    assert places(tmp_path) == {"out"}


def test_folders_are_names_too_and_json_is_plain(tmp_path: Path) -> None:
    found = done("compose", "compress(movie_a + spam, 4)", MOVIE_A, SPAM, "-o", "out", "--json", cwd=tmp_path)
    data = found.json()
    assert data["modules"] == 18 and data["rank"] == 4 and data["out"] == "out"


def test_peft_loads_what_is_composed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    done("compose", "a - 0.5*b", f"a={MOVIE_A}", f"b={SPAM}", "-o", "lora", "--quiet", cwd=tmp_path)
    done("compose", "negate(a, 0.5) + b", f"a={IA3_A}", f"b={IA3_B}", "-o", "ia3", "--quiet", cwd=tmp_path)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    torch.manual_seed(0)
    base = transformers.BertModel(config).eval().requires_grad_(False)
    tokens = torch.arange(10)[None]
    plain = base(tokens).last_hidden_state
    for name in ("lora", "ia3"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = peft.PeftModel.from_pretrained(base, tmp_path / name).eval()
        assert float((model(tokens).last_hidden_state - plain).abs().max()) > 1e-3
        base = model.unload()
    assert torch.equal(base(tokens).last_hidden_state, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ia3(dtype: str, tmp_path: Path) -> None:
    found = done("compose", "0.6*a + 0.4*b", f"a={IA3_A}", f"b={IA3_B}", "-o", "out", "--dtype", dtype, cwd=tmp_path)
    assert found.out == "out: (IA)³, 18 modules\n"
    a, b, got = fl.load(IA3_A), fl.load(IA3_B), fl.load(tmp_path / "out")
    for module in a.modules:
        expected = (0.6 * a.vector(module) + 0.4 * b.vector(module)).to(getattr(torch, dtype)).double()
        assert torch.equal(got.vector(module), expected)
    data = done("compose", "-a", f"a={IA3_A}", "-o", "out", "--overwrite", "--json", cwd=tmp_path).json()
    assert data == {"out": "out", "kind": "IA3", "modules": 18, "notices": []}


def task_vectors(root: Path) -> tuple[dict[str, torch.Tensor], Path]:
    base = {"layer.weight": torch.randn(6, 4), "layer.bias": torch.randn(6)}
    tuned = {n: t + torch.randn(t.shape) for n, t in base.items()}
    return base, fl.task_vector(base, tuned, "x").save(root / "x.safetensors")


def test_task_vectors(tmp_path: Path) -> None:
    _, path = task_vectors(tmp_path)
    found = done("compose", "-x/2", f"x={path}", "-o", "half.safetensors", cwd=tmp_path)
    assert found.out == "half.safetensors: task vector of 2 parameters\n"
    whole, half = fl.load(path), fl.load(tmp_path / "half.safetensors")
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(half.deltas[name], -0.5 * delta)
    assert "exists" in refused("compose", "x", f"x={path}", "-o", "half.safetensors", cwd=tmp_path)
    assert "is an input" in refused("compose", "x", f"x={path}", "-o", path, "--overwrite", cwd=tmp_path)
    assert "written as a file, NAME.safetensors" in refused("compose", "x", f"x={path}", "-o", "out", cwd=tmp_path)
    message = refused("compose", "a", f"a={SPAM}", "-o", "out.safetensors", cwd=tmp_path)
    assert "out.safetensors has the name of a file, and a PEFT adapter is a directory" in message
    message = refused("compose", "x + a", f"a={SPAM}", f"x={path}", "-o", "out", cwd=tmp_path)
    assert "'x' is a task vector" in message and ".extract(rank=…)" in message
    printed = done("inspect", path, cwd=tmp_path).out
    assert "x: task vector, 2 parameters" in printed and "6×4" in printed
    assert done("inspect", path, "--json", cwd=tmp_path).json()["parameters"]["layer.bias"]["shape"] == [6]


def test_inspect_of_ia3(tmp_path: Path) -> None:
    printed = done("inspect", IA3_A, cwd=tmp_path).out
    heading = "movie_ia3_a: (IA)³, 18 modules, float32, base model sentence-transformers/all-MiniLM-L6-v2"
    assert " ".join(printed.split()).startswith(heading)
    assert "0.intermediate.dense" in printed and "outputs and bias" in printed
    data = done("inspect", IA3_A, "--json", cwd=tmp_path).json()
    module = data["modules"]["encoder.layer.0.intermediate.dense"]
    vector = fl.load(IA3_A).vector("encoder.layer.0.intermediate.dense")
    assert module["scales"] == "inputs" and module["shape"] == [1, 384]
    assert module["change"] == pytest.approx(float((vector - 1).square().mean().sqrt()))
    assert (module["least"], module["largest"]) == (float(vector.min()), float(vector.max()))


def test_merge_by_pem(tmp_path: Path) -> None:
    done("merge", f"{MOVIE_A}:0.75", f"{MOVIE_B}:0.25", "--method", "pem", "--out", "out", cwd=tmp_path)
    a, b, got = fl.load(MOVIE_A), fl.load(MOVIE_B), fl.load(tmp_path / "out")
    expected = fl.add([a, b], [0.75, 0.25], semantics="pem")
    for module in a.modules:
        assert (got.delta(module) - expected.delta(module)).norm() <= FLOAT32 * expected.delta(module).norm()
    message = refused("merge", MOVIE_A, TREC, "--method", "pem", "--out", "other", cwd=tmp_path)
    assert "has rank 8 in 'movie_a' and 16 in 'trec_r16'" in message and "'exact'" in message


@pytest.mark.parametrize("command", ["merge", "decompose", "overlap", "compress"])
def test_ia3_is_refused_where_it_has_no_meaning(command: str, tmp_path: Path) -> None:
    inputs = [IA3_A] if command == "compress" else [IA3_A, IA3_B]
    rest = {"overlap": [], "compress": ["--rank", "2", "-o", "out"]}.get(command, ["-o", "out"])
    message = refused(command, *inputs, *rest, cwd=tmp_path)
    assert "'movie_ia3_a' is an (IA)³ adapter" in message and "`fastlora compose`" in message


def test_a_bound_on_memory_changes_no_bit(tmp_path: Path) -> None:
    first, second = shared_pool(tmp_path / "in", 2)
    found = []
    for bound in ([], ["--memory", "1GiB"]):
        named = [f"a={first}", f"b={second}"]
        done("compose", "a - unique(b | a)", *named, *bound, "-o", "out", "--overwrite", cwd=tmp_path)
        found.append(tree(tmp_path / "out"))
    assert found[0] == found[1]


def test_replaced_modules_are_refused_or_dropped(tmp_path: Path) -> None:
    with_head = make_adapter(tmp_path / "head", modules_to_save=["lm_head"])
    file = with_head / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.ones(3, 3)}, file)
    message = refused(
        "compose", "h + a", f"h={with_head}", f"a={make_adapter(tmp_path / 'a')}", "-o", "x", cwd=tmp_path
    )
    assert "replaces lm_head.weight" in message and "--drop-extras" in message
    done("compose", "h + a", f"h={with_head}", f"a={tmp_path / 'a'}", "-o", "x", "--drop-extras", cwd=tmp_path)


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "syntax": (
        ["0.6*a +", f"a={SPAM}"],
        "the expression ends too early; expected a name, a number, +, - or (\n  0.6*a +\n         ^",
    ),
    "unknown name": (["a + b", f"a={SPAM}"], "no adapter is called 'b' (known: a)\n  a + b\n      ^"),
    "unused": (["a", f"a={SPAM}", f"b={MOVIE_A}"], "the expression does not use b; leave out what it does not name"),
    "type": (
        ["a + 1", f"a={SPAM}"],
        "an adapter and a number cannot be added; multiply one by the other, or add adapters\n  a + 1\n      ^",
    ),
    "kinds": (["a + b", f"a={SPAM}", f"b={IA3_A}"], "'a' is a LoRA adapter and 'b' is an (IA)³ adapter"),
    "weights": (["a", f"a={SPAM}:0.5"], "a: weights have no meaning for this command"),
    "path": (["a", "a=no/where/x"], "there is no file or directory"),
    "dora": (["a", f"a={DATA / 'movie_dora'}"], "adapter 'a' is a DoRA adapter"),
    "names": (["a", f"a={SPAM}", f"a={MOVIE_A}"], "two adapters are called 'a'"),
    "dtype": (["a", f"a={SPAM}", "--dtype", "int8"], "dtype 'int8'"),
    "memory": (["a", f"a={SPAM}", "--memory", "much"], "memory='much'"),
    "no adapters": (["a"], "Missing argument"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, tmp_path: Path) -> None:
    arguments, message = MISTAKES[case]
    assert refused("compose", *arguments, "--out", "out", cwd=tmp_path).startswith(message)


@pytest.mark.parametrize("text", ["-a", "-a + other", "-other*2 - a", "- a", "-1*a", "-(a)", "--a"])
def test_expressions_may_start_with_a_minus(text: str, tmp_path: Path) -> None:
    named = [n for n in (f"a={SPAM}", f"other={MOVIE_A}") if n.partition("=")[0] in text]
    if text == "--a":
        assert "No such option" in refused("compose", text, *named, "-o", "out", cwd=tmp_path)
        return
    done("compose", text, *named, "-o", "out", "-q", cwd=tmp_path)
    got, expected = fl.load(tmp_path / "out"), fl.compose(text, {"a": SPAM, "other": MOVIE_A})
    for module in got.modules:
        assert (got.delta(module) - expected.delta(module)).norm() <= FLOAT32 * expected.delta(module).norm()


def test_existing_outputs_are_kept(tmp_path: Path) -> None:
    done("compose", "-a", f"a={SPAM}", "-o", "out", "--quiet", cwd=tmp_path)
    assert "exists" in refused("compose", "a", f"a={SPAM}", "-o", "out", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    done("compose", "-a", f"a={IA3_A}", "-o", "out", "--overwrite", "--quiet", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "IA3"
