"""What users lost without a word: files beside an adapter, adapters that change nothing; and wide ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gaussian, make_adapter, make_config, make_factors, peft_tensors, write_peft
from command import done, refused
from safetensors.torch import load_file, save_file
from told import COMMANDS, SMALL
from tolerances import FLOAT32, SUMS32

import fastlora as fl


def make_untrained(folder: Path, side: str = "B") -> Path:
    """An adapter whose ``lora_B`` (or ``lora_A``) are all zero."""
    factors = {m: (b * (side != "B"), a * (side != "A")) for m, (b, a) in make_factors(SMALL, seed=9).items()}
    return write_peft(folder, peft_tensors(factors))


def make_scalings(folder: Path, value: float) -> Path:
    """An (IA)³ adapter whose vectors have one value."""
    config = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    tensors = {
        "base_model.model.layers.0.k_proj.ia3_l": torch.full((6, 1), value),
        "base_model.model.layers.0.down_proj.ia3_l": torch.full((1, 8), value),
    }
    return write_peft(folder, tensors, config)


BESIDE = [
    "non_lora_trainables.bin",
    "value_head.safetensors",
    "value_head.bin",
    "new_embeddings.safetensors",
    "trainable_params.bin",
    "mm_projector.bin",
    "model.safetensors",
    "2_Dense/model.safetensors",
    "mm_projector/checkpoint-5.bin",
]
USUAL = [
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "training_args.bin",
    "trainer_state.json",
    "tokenizer.json",
    "tokenizer.model",
    "README.md",
    "adapter_model.bin",
    "runs/events.out.tfevents.1",
    "global_step5/mp_rank_00_model_states.pt",
    "checkpoint-5/value_head.bin",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("beside", ["non_lora_trainables.bin", "2_Dense/model.safetensors"])
def test_trained_files_beside_an_adapter_are_told_by_every_command(command: str, beside: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "trained", SMALL, seed=1)
    make_adapter(tmp_path / "x", SMALL, seed=2)
    (tmp_path / "x" / beside).parent.mkdir(exist_ok=True)
    (tmp_path / "x" / beside).write_bytes(b"parameters")
    (line,) = [line for line in done(*COMMANDS[command], cwd=tmp_path).err.splitlines() if beside in line]
    assert line.startswith("note: adapter ") and "no part of a result" in line


@pytest.mark.parametrize("beside", BESIDE)
def test_trained_files_are_told_in_python_and_follow_arithmetic(beside: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "x", SMALL)
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_bytes(b"parameters")
    adapter = fl.load(folder)
    (note,) = adapter.notes
    assert f"'x': {beside} beside it" in note
    assert (0.5 * adapter).notes == fl.compress(adapter, 2).notes == adapter.notes
    (folder / beside).unlink()
    assert fl.load(folder).notes == ()


def test_what_a_checkpoint_always_holds_needs_no_note(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "x", SMALL)
    make_adapter(folder / "other", SMALL)
    for name in USUAL:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"state")
    (folder / "merged").mkdir()
    (folder / "merged" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "merged" / "model.safetensors").write_bytes(b"a whole model")
    assert fl.load(folder).notes == ()


def test_two_files_of_one_adapter(tmp_path: Path) -> None:
    """The older one is left from an earlier run, unless both hold the same."""
    folder = make_adapter(tmp_path / "x", SMALL)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    assert fl.load(folder).notes == ()
    for changed in ({k: 2 * t for k, t in tensors.items()}, dict(list(tensors.items())[1:])):
        torch.save(changed, folder / "adapter_model.bin")
        (note,) = fl.load(folder).notes
        assert "adapter_model.bin beside adapter_model.safetensors holds other tensors and is not read" in note


def test_scalings_tell_what_lies_beside_them(tmp_path: Path) -> None:
    folder = make_scalings(tmp_path / "x", 1.5)
    (folder / "value_head.bin").write_bytes(b"parameters")
    assert "value_head.bin" in fl.load(folder).notes[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("side", "BA")
def test_an_adapter_that_changes_nothing_is_told_by_every_command(command: str, side: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "trained", SMALL, seed=1)
    make_untrained(tmp_path / "x", side)
    found = done(*COMMANDS[command], cwd=tmp_path)
    lines = [line for line in found.err.splitlines() if f"changes nothing: all its lora_{side} are zero" in line]
    assert len(lines) == 1 and lines[0].startswith("note: adapter ")
    assert "100.00 % of the energy" not in found.out or command.startswith("merge")


def test_compress_claims_no_share_of_nothing(tmp_path: Path) -> None:
    make_untrained(tmp_path / "x")
    data = done("compress", "x", "--rank", "2", "-o", "out", "--json", cwd=tmp_path).json()
    assert data["rank"] == 0 and data["retained_energy"] is None
    assert any("changes nothing" in note for note in data["notices"])
    nothing = 0.0 * fl.load(make_adapter(tmp_path / "a", SMALL))
    assert "the result changes nothing: every update is zero" in fl.compress(nothing, rank=2).notes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"B": 0.0}, "all its lora_B are zero"),
        ({"A": 0.0}, "all its lora_A are zero"),
        ({"alpha": 0.0}, "its scaling is zero"),
        ({"apart": 1.0}, "every update is zero"),
    ],
)
def test_every_way_to_change_nothing(change: dict[str, float], why: str, tmp_path: Path) -> None:
    factors = {}
    for module, (b, a) in make_factors(SMALL).items():
        if "apart" in change:  # columns of B meet rows of A that are zero
            b[:, :2], a[2:] = 0, 0
        factors[module] = b * change.get("B", 1.0), a * change.get("A", 1.0)
    folder = write_peft(tmp_path / "x", peft_tensors(factors), make_config(lora_alpha=change.get("alpha", 8)))
    assert f"adapter 'x' changes nothing: {why}" in fl.load(folder).notes[0]


def test_one_update_is_enough_to_change_something(tmp_path: Path) -> None:
    factors = make_factors(SMALL)
    first, second = factors
    factors[first][0].zero_()
    assert fl.load(write_peft(tmp_path / "x", peft_tensors(factors))).notes == ()
    factors[second][0][:-1] = 0  # its last row alone
    assert fl.load(write_peft(tmp_path / "y", peft_tensors(factors))).notes == ()
    factors[second][0][-1] = 0
    head = torch.ones(2, 16)
    tensors = {**peft_tensors(factors), "base_model.model.score.weight": head}
    with_head = fl.load(write_peft(tmp_path / "z", tensors, make_config(modules_to_save=["score"])))
    assert "changes nothing but what it holds beside its updates" in with_head.notes[0]


def test_what_the_configuration_names_and_the_file_lacks(tmp_path: Path) -> None:
    lost = fl.load(make_adapter(tmp_path / "a", SMALL, modules_to_save=["classifier", "score"]))
    assert "'modules_to_save' names classifier, score, and its file holds no tensor of it" in lost.notes[0]
    patterns = {"v_proj": 3, "layers.0.self_attn.q_proj": 2, "mlp.up_proj": 5}
    scaled = fl.load(make_adapter(tmp_path / "b", SMALL, alpha_pattern=patterns))
    (note,) = scaled.notes
    assert "'alpha_pattern' has 'mlp.up_proj', which is for no module" in note
    assert scaled.update("model.layers.0.self_attn.v_proj").scaling == 3 / 4
    saved = fl.load((scaled.without_extras()).save(tmp_path / "c"))
    assert saved.notes == ()


def test_other_kinds_that_change_nothing(tmp_path: Path) -> None:
    assert "all its vectors are one" in fl.load(make_scalings(tmp_path / "ones", 1.0)).notes[0]
    assert fl.load(make_scalings(tmp_path / "scaled", 1.5)).notes == ()
    done("inspect", "ones", cwd=tmp_path)
    assert "changes nothing" in done("compose", "a", "a=ones", "-o", "out", cwd=tmp_path).err
    zero = {"q": (torch.zeros(4, 2), gaussian(2, 3, seed=1))}
    assert "changes nothing" in fl.Adapter.from_tensors(zero).notes[0]
    model = {"q.weight": gaussian(4, 4, seed=1)}
    assert "changes nothing" in fl.task_vector(model, model, "same").notes[0]
    save_file({"q.weight": torch.zeros(2, 2)}, tmp_path / "t.safetensors", {"fastlora": '{"kind": "task_vector"}'})
    assert "'t' changes nothing" in fl.load(tmp_path / "t.safetensors").notes[0]


def test_inspect_and_python_tell_the_same(tmp_path: Path) -> None:
    make_untrained(tmp_path / "pool" / "x")
    make_adapter(tmp_path / "pool" / "trained", SMALL)
    (note,) = fl.load(tmp_path / "pool" / "x").notes
    assert done("inspect", "pool/x", "--json", cwd=tmp_path).json()["notes"] == [note]
    assert f"note: {note}\n" in done("inspect", "pool", cwd=tmp_path).err
    alone = done("inspect", "pool/x", cwd=tmp_path)
    assert alone.out.count("note:") == 1 and not alone.err  # in the report, and there once
    pool = fl.Pool.load(tmp_path / "pool")
    assert note in pool.told and note in fl.merge(pool).notes and note in fl.overlap(pool).notices
    assert note in fl.decompose(pool).report.notices and note in fl.decompose(pool).unique_of("x").notes
    assert note in fl.modulate(pool["trained"], fl.dipm.interpolate(pool["x"], 0.5)).notes
    assert note in fl.compose("a + b", {"a": pool["x"], "b": pool["trained"]}).notes


# Ranks above the sides of a module


def make_wide(folder: Path, rank: int, side: int = 16) -> Path:
    return make_adapter(folder, {f"model.layers.{i}.q_proj": (side, side) for i in range(2)}, rank=rank, alpha=rank)


@pytest.mark.parametrize(("rank", "side"), [(20, 16), (40, 16), (200, 3), (33, 16)])
def test_ranks_above_the_sides_of_a_module(rank: int, side: int, tmp_path: Path) -> None:
    make_wide(tmp_path / "wide", rank, side)
    make_adapter(tmp_path / "other", {f"model.layers.{i}.q_proj": (side, side) for i in range(2)}, rank=2, seed=3)
    wide, other = fl.load(tmp_path / "wide"), fl.load(tmp_path / "other")
    done("compress", "wide", "--rank", side, "-o", "exact", cwd=tmp_path)
    done("merge", "wide:1", "other:1", "--rank", side, "-o", "mix", cwd=tmp_path)
    done("merge", "wide", "other", "--method", "cat", "-o", "cat", cwd=tmp_path)
    done("compose", "a + b", "a=wide", "b=other", "-o", "sum", cwd=tmp_path)
    done("modulate", "wide", "--op", "scale:0.5", "-o", "half", cwd=tmp_path)
    done("decompose", "wide", "other", "-o", "parts", cwd=tmp_path)
    done("overlap", "wide", "other", cwd=tmp_path)
    done("inspect", "wide", cwd=tmp_path)
    for module in wide:
        expected = {"exact": wide.delta(module), "half": wide.delta(module) / 2}
        expected |= dict.fromkeys(("mix", "cat", "sum"), wide.delta(module) + other.delta(module))
        for place, delta in expected.items():
            found = fl.load(tmp_path / place).delta(module)
            assert (found - delta).norm() <= FLOAT32 * delta.norm(), place
        parts = fl.decompose(fl.Pool([wide, other]))
        total = parts.shared_of("wide").delta(module) + parts.unique_of("wide").delta(module)
        assert (total - wide.delta(module)).norm() <= SUMS32 * wide.delta(module).norm()
        a, b = (x.delta(module).double() for x in (wide, other))
        cosine = fl.overlap(fl.Pool([wide, other]), modules=True).modules[module][0][0, 1]
        assert abs(float(cosine) - float((a * b).sum() / a.norm() / b.norm())) <= FLOAT32
    assert fl.load(tmp_path / "exact").update(module).rank == side


def test_a_rank_out_of_all_proportion_is_refused(tmp_path: Path) -> None:
    make_wide(tmp_path / "wide", 3000, 1)
    assert "rank is far above both sides" in refused("inspect", "wide", cwd=tmp_path)
