"""A larger real model on sequences of antibodies: adapters trained on demand and kept, and what they do to accuracy.

    pip install peft transformers
    pip install --no-deps antiberty==0.1.3 abstar==0.8.0 modlamp==4.3.3
    python examples/antibodies.py      # the weights are where they belong: residues that were masked are found

The model is AntiBERTy, a BERT of 8 layers. The sequences are genes of antibodies and receptors with their names, and
peptides; nothing of the packages is imported, their files are read. A fragment belongs to the class whose training
fragments are nearest in the base model's mean, so no head is trained. Genes of the test have no fragment in training.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from adapters import train
from adapters.train import Rows, package_file
from texts import Texts
from torch.nn import functional as F

NEEDED = {
    "peft": "peft",
    "transformers": "transformers",
    "antiberty": "--no-deps antiberty==0.1.3",
    "abstar": "--no-deps abstar==0.8.0",
    "modlamp": "--no-deps modlamp==4.3.3",
}
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
LENGTH = 24  # residues of a fragment
GENES = {"training": 0.5, "validation": 0.2, "test": 0.3}  # shares of the genes of every class
COUNTS = {"training": 1000, "validation": 24, "test": 144}  # rows
HEAD = 300  # training rows that make the head
TOKENS, BATCH, TEMPERATURE, BASE = LENGTH + 2, 16, 20.0, "AntiBERTy"
embed, accuracy = (functools.partial(f, tokens=TOKENS) for f in (train.embed, train.accuracy))
pooled = train.pooled
BASES = "TCAG"
CODE = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"  # codons in the order of BASES
CODONS = {"".join(three): residue for three, residue in zip(itertools.product(BASES, repeat=3), CODE, strict=True)}
Classes = list[dict[str, list[str]]]  # by class and gene, the proteins


@functools.cache
def genes(place: str) -> dict[str, str]:
    """Proteins of the variable genes by name, without those that have a stop or a base that is not known."""
    found: dict[str, str] = {}
    text = package_file("abstar", f"germline_dbs/{place}/ungapped/v.fasta").read_text()
    for entry in text.split(">")[1:]:
        name, *lines = entry.split()
        bases = "".join(lines).upper()
        protein = "".join(CODONS.get(bases[i : i + 3], "*") for i in range(0, len(bases) - 2, 3))
        if "*" not in protein:
            found[name] = protein
    return found


def of_class(patterns: dict[str, list[str]]) -> Classes:
    """For every class, the distinct proteins of every gene: ``patterns`` has places and beginnings of names."""
    found = []
    for label, places in patterns.items():
        own: dict[str, list[str]] = {}
        for place in places:
            for name, protein in genes(place).items():
                if re.match(label, name):
                    gene = f"{place} {name.split('*')[0]}"
                    own.setdefault(gene, []).append(protein)
        found.append({gene: sorted(set(of)) for gene, of in own.items()})
    return found


HUMAN, MACAQUE, RECEPTORS = "bcr/human", "bcr/macaque", "tcr/human"


def heavy() -> Classes:
    """Families of heavy chains of humans and macaques."""
    return of_class({f"IGHV{family}[^0-9]": [HUMAN, MACAQUE] for family in (1, 2, 3, 4, 5)})


def light() -> Classes:
    """Families of light chains of humans and macaques."""
    return of_class({f"IG{chain}V{family}[^0-9]": [HUMAN, MACAQUE] for chain in "KL" for family in (1, 2, 3)})


def receptor() -> Classes:
    """Alpha or beta chain of human T cell receptors, which the model has not seen."""
    return of_class({"TRAV": [RECEPTORS], "TRBV": [RECEPTORS]})


def peptide() -> Classes:
    """Peptides of other proteins or against microbes, a gene each."""
    found: Classes = [{}, {}]
    with package_file("modlamp", "data/AMPvsUniProt.csv").open(newline="") as file:
        for sequence, label, *_ in list(csv.reader(file))[1:]:
            if set(sequence) <= set(RESIDUES):
                found[int(label)][sequence] = [sequence]
    return found


TASKS: dict[str, Callable[[], Classes]] = {
    "heavy": heavy,
    "light": light,
    "receptor": receptor,
    "peptide": peptide,
}


def fragment(protein: str, drawn: random.Random) -> str:
    """As the model's input: residues with spaces between them."""
    start = drawn.randrange(max(1, len(protein) - LENGTH + 1))
    return " ".join(protein[start : start + LENGTH])


def rows_of(task: str, part: str, count: int, seed: int) -> Rows:
    """Fragments of the genes of one part, classes in turn."""
    drawn = random.Random(f"{task} {part} {seed}")
    before = sum(share for name, share in GENES.items() if list(GENES).index(name) < list(GENES).index(part))
    of_label = []
    for label, own in enumerate(TASKS[task]()):
        names = sorted(own)
        random.Random(f"{task} {seed}").shuffle(names)
        first, last = (round(len(names) * share) for share in (before, before + GENES[part]))
        own_genes = [own[name] for name in names[first:last]]
        of_label.append([(fragment(drawn.choice(drawn.choice(own_genes)), drawn), label) for _ in range(count)])
    return [of_label[i % len(of_label)][i // len(of_label)] for i in range(count)]


def base_model(folder: Path) -> tuple[Any, Any]:
    """AntiBERTy's encoder, whose weights are read and nothing else; ``folder`` is not needed."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**config()), add_pooling_layer=False)
    return filled(model, "bert."), tokenizer()


def filled(model: Any, prefix: str) -> Any:
    """With the stored weights, all that it has."""
    weights = {name.removeprefix(prefix): value for name, value in stored().items()}
    absent = model.load_state_dict(weights, strict=False).missing_keys
    if absent:
        raise SystemExit(f"antiberty: no weights of {', '.join(absent)}")
    return model.eval()


@functools.cache
def stored() -> dict[str, torch.Tensor]:
    file = package_file("antiberty", "trained_models/AntiBERTy_md_smooth/pytorch_model.bin")
    found: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def config() -> dict[str, Any]:
    text = package_file("antiberty", "trained_models/AntiBERTy_md_smooth/config.json").read_text()
    wanted = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
    return {key: json.loads(text)[key] for key in [*wanted, "max_position_embeddings", "type_vocab_size"]}


def tokenizer() -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(str(package_file("antiberty", "trained_models/vocab.txt")), do_lower_case=False)


class Antibodies(Texts):
    """The base model with its tasks; training and evaluation are in bfloat16."""

    def __init__(self, cache: Path, test_rows: int, seed: int) -> None:
        super().__init__(cache, test_rows, seed, sys.modules[__name__])

    def arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    def _task(self, name: str) -> tuple[Any, Any, torch.Tensor]:
        rows = {part: rows_of(name, part, count, self.seed) for part, count in COUNTS.items()}
        with torch.no_grad(), self.arithmetic():
            known = rows["training"][:HEAD]
            states = embed(self.model.eval(), self.tokenizer, [text for text, _ in known])
        labels = torch.tensor([label for _, label in known])
        head = torch.stack([states[labels == label].mean(0) for label in range(len(TASKS[name]()))])
        return rows["training"] + rows["validation"], rows["test"][: self.test_rows], F.normalize(head, dim=-1)


@torch.no_grad()
def masked(sequences: list[str]) -> tuple[float, float]:
    """Shares of residues that the model finds where every tenth is masked, and that the most frequent one would be."""
    from transformers import BertConfig, BertForMaskedLM

    model, words = filled(BertForMaskedLM(BertConfig(**config())), ""), tokenizer()
    found, wanted = [], []
    for sequence in sequences:
        ids = torch.tensor([words(" ".join(sequence)).input_ids])
        for first in range(1, 11):
            places = torch.arange(first, ids.shape[1] - 1, 10)
            hidden = ids.clone()
            hidden[0, places] = words.mask_token_id
            found.append(model(hidden).logits[0, places].argmax(-1))
            wanted.append(ids[0, places])
    right, residues = torch.cat(found) == torch.cat(wanted), torch.cat(wanted)
    return float(right.double().mean()), float(residues.bincount().max() / len(residues))


def main() -> None:
    genes_of = {name: [p for own in TASKS[name]() for of in own.values() for p in of] for name in TASKS}
    for name, sequences in genes_of.items():
        right, frequent = masked(random.Random(0).sample(sequences, 8))
        print(f"{name}: {right:.3f} of the masked residues are found; the most frequent one is {frequent:.3f} of them")


if __name__ == "__main__":
    main()
