"""What can be timed, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.bench import dense, extraction, files, merging, models, passes, small_files, solvers
from fastlora.bench.contest import Contest
from fastlora.bench.workloads import NAMES, REAL
from fastlora.errors import InputError


@dataclass(frozen=True, slots=True)
class Case:
    """``workloads``: what a case that works on pools is run on by default; ``make`` takes the name of one.

    ``slow``: takes many minutes, so it runs only when it is named.
    """

    summary: str
    make: Callable[..., list[Contest]]
    workloads: tuple[str, ...] = ()
    slow: bool = False

    def contests(self, workloads: Sequence[str] = ()) -> list[Contest]:
        """On some workloads, or on the default ones."""
        if not self.workloads:
            return self.make()
        return [c for w in workloads or self.workloads for c in self.make(w)]


MAIN = "llama2-7b-8x16"

CASES: dict[str, Case] = {
    "eigh": Case("batched eigendecomposition against torch.linalg", solvers.eigh),
    "svd": Case("batched singular value decomposition against torch.linalg", solvers.svd),
    "dense": Case("one 1024×1024 module against the paper's dense algorithm", dense.dense),
    "merge": Case("svd merge against plain torch, torch QR and dense SVD", merging.merge),
    "gram": Case("the pass that reads", passes.gram, (MAIN,)),
    "combine": Case("the pass that writes", passes.combine, (MAIN,)),
    "decompose": Case(
        "whole decompositions in memory against plain torch",
        passes.decompose,
        (MAIN, f"{MAIN}-fp32", "flux-4x32", "vit-b32-8x16", REAL),
    ),
    "files": Case("whole decompositions, files to files, against copying", files.files, (MAIN,)),
    "small-files": Case("hundreds of small adapters, loaded and saved, against safetensors", small_files.small),
    "memory": Case("the same within memory=1GiB against without a bound", files.memory, (MAIN,)),
    "memory-70b": Case("the same on the shapes of a 70B model", files.memory, ("llama3-70b-8x16",), slow=True),
    "containers": Case(
        "ctm and core merges of whole models against our svd merge",
        merging.containers,
        ("llama3-8b-6x16", MAIN),
        slow=True,
    ),
    "methods": Case(
        "merges of a whole model by every method of Gram blocks against our svd merge",
        merging.methods,
        (MAIN,),
        slow=True,
    ),
    "peft": Case("svd merge of one 4096×4096 module against peft (a minute)", merging.peft, slow=True),
    "peft-ties": Case("ties of one 4096×4096 module against peft (two minutes)", merging.peft_ties, slow=True),
    "extract": Case(
        "one weight's change against torch.svd_lowrank and torch.linalg.svd", extraction.extract, slow=True
    ),
    "apply": Case("an adapter in the weights of a model of 2.2 GB against cp -r (minutes)", models.small, slow=True),
    "apply-large": Case("the same in a model of 5.3 GB, with room for three (minutes)", models.large, slow=True),
    "paper": Case(
        "one 4096×4096 module against parts of the paper's dense algorithm (minutes)", dense.paper, slow=True
    ),
    "paper-whole": Case("the same, the dense algorithm run once (half an hour)", dense.paper_whole, slow=True),
}


def names_data() -> dict[str, Any]:
    """Cases and workloads by name, as plain data."""
    cases = {n: {"summary": c.summary, "workloads": list(c.workloads), "slow": c.slow} for n, c in CASES.items()}
    return {"cases": cases, "workloads": list(NAMES)}


def select(names: Sequence[str] = ()) -> list[Contest]:
    """The contests of some cases and workloads.

    Cases alone run on their default workloads; workloads alone run in every case that takes one; both together run
    the one on the other. Nothing named: every case that is not slow.
    """
    unknown = [n for n in names if n not in CASES and n not in NAMES]
    if unknown:
        raise InputError(
            f"bench has no case or workload {', '.join(unknown)}: use {', '.join(CASES)}, or {', '.join(NAMES)}"
        )
    workloads = [n for n in names if n in NAMES]
    cases = [CASES[n] for n in names if n in CASES]
    if not cases:
        cases = [c for c in CASES.values() if not c.slow and (c.workloads or not workloads)]
    alone = [n for n in names if n in CASES and workloads and not CASES[n].workloads]
    if alone:
        raise InputError(f"bench: {', '.join(alone)} takes no workload; leave out {', '.join(workloads)}")
    return [contest for case in cases for contest in case.contests(workloads)]
