"""Multi-task merging of a small vision transformer's fine-tunes: coefficients swept or learned, with extra vectors.

    pip install scikit-learn peft
    python examples/merging.py [--out DIR] [--seeds 3] [--jobs 1] [--quick]

Four domains of handwritten digits, as full fine-tunes and as LoRA adapters. What is compared is in multitask.py;
results: docs/experiments.md. For adapters of a language model see merging_texts.py.
"""

from __future__ import annotations

from functools import partial

import torch
from common import Results, arguments, console, of_seeds
from digits import DOMAINS, NEEDED, POOLS, Digits, deltas_of
from multitask import Setting, compare

import fastlora as fl

THRESHOLD = {"full": 0.85, "lora": 0.3}  # left spectra of LoRA adapters stay far below the paper's 0.85
RANK = {"full": 8, "lora": None}
STEPS, BATCH, RATE = 50, 32, 2e-2


def setting_of(digits: Digits, kind: str, seed: int, quick: bool) -> Setting:
    def scores(adapter: fl.Adapter, test: bool = True) -> dict[str, float]:
        state = digits.state(deltas_of(adapter))
        return {name: digits.accuracy(state, name, test=test) for name in DOMAINS}

    generator = torch.Generator().manual_seed(seed)
    steps = 2 if quick else STEPS
    batches = {
        name: [x[torch.randint(len(x), (BATCH,), generator=generator)] for _ in range(steps)]
        for name, (x, _) in digits.test.items()
    }
    return Setting(
        title=f"Four domains in one model: {POOLS[kind]}, τ = {THRESHOLD[kind]}",
        pool=fl.Pool(digits.adapters(kind).values()),
        score=scores,
        validate=lambda adapter: scores(adapter, test=False),
        model=digits.model,
        batches=batches,
        loss=None,  # entropy of the model's output
        steps=steps,
        lr=RATE,
        threshold=THRESHOLD[kind],
        rank=RANK[kind],
    )


def one_seed(seed: int, quick: bool) -> Results:
    console.print(f"seed {seed}: training the base model and {len(DOMAINS)} fine-tunes of each kind")
    results = Results()
    digits = Digits(seed, shorter=20 if quick else 1)
    for kind in POOLS:
        console.print(f"seed {seed}: merging {POOLS[kind]}")
        compare(setting_of(digits, kind, seed, quick), seed, results)
    return results


def main() -> None:
    options = arguments(__doc__, "merging", NEEDED)
    results = Results()
    for found in of_seeds(partial(one_seed, quick=options.quick), options):
        results.extend(found)
        results.save(options.out)  # of the seeds so far
    results.show()
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
