"""Our extraction beside mergekit's, on a small Llama and its fine-tune, where both are exact."""

from __future__ import annotations

from pathlib import Path

import owners
import pytest
import torch

import fastlora as fl
from fastlora.engine import low_rank

CHANGED = 4
"""The rank of every change."""
AGREE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base model and the fine-tune, which differ in every matrix."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() == 2):
            weight += 0.05 * torch.randn(weight.shape[0], CHANGED) @ torch.randn(CHANGED, weight.shape[1])
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned"


@pytest.mark.parametrize(
    ("rank", "side"), [(64, 1024), (CHANGED, 1024), (CHANGED, 0), (2, 1024)],
    ids=["whole", "rank of the change", "rank of the change, range finder", "cut"],
)  # fmt: skip
def test_changes_are_those_of_mergekit(
    rank: int, side: int, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = owners.module("mergekit.scripts.extract_lora")
    base, tuned = folders
    given = ["--model", tuned, "--base-model", base, "--out-path", tmp_path / "theirs", "--max-rank", rank]
    theirs.main([*map(str, given), "--embed-lora", "--skip-undecomposable"], standalone_mode=False)
    expected = fl.load(tmp_path / "theirs")
    monkeypatch.setattr(low_rank, "EXACT_SIDE", side)
    found = fl.extract(base, tuned, rank=rank, embeddings="factor", norms="skip")
    assert isinstance(expected, fl.Adapter) and len(found.modules) == 9
    assert set(found.modules) == set(expected.modules)
    for module in found.modules:
        delta = expected.delta(module).double()
        assert float((found.delta(module).double() - delta).norm()) <= AGREE * float(delta.norm())
