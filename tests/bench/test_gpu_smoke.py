"""What a window tries first on a device: every form is right where kernels are, and one that is wrong is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import ON_HOST

from fastlora.backends import cuda, triton
from fastlora.bench.gpu import smoke
from fastlora.bench.gpu.forms import Form, Found, all_forms
from fastlora.bench.gpu.forms.form import worst
from fastlora.ops import dispatch
from fastlora.ops.dispatch import Kernel

FORMS = all_forms()
SLOW = ("240", "r=72")  # a second and more on a CPU; the emulator's tests have these sizes


def quick() -> list[Form]:
    return [form for name, form in FORMS.items() if not any(word in name for word in SLOW)]


def test_every_form_is_right_on_the_cpu() -> None:
    """The checks themselves: their references, their bounds, and that no form is refused."""
    rows = [smoke.tried(form, "cpu") for form in quick()]
    assert not [row for row in rows if "failed" in row]
    skipped = {row["form"] for row in rows if "skipped" in row}
    assert skipped == {name for name in FORMS if name.endswith("graph")}


def test_every_op_is_tried() -> None:
    """Also those that are plain torch on a device."""
    tried: set[str] = set()

    class Spying(dict[str, Kernel]):
        def get(self, op: str, default: Any = None) -> Any:
            tried.add(op)
            return super().get(op, default)

        def __getitem__(self, op: str) -> Kernel:
            tried.add(op)
            return super().__getitem__(op)

    table = dispatch.kernels(ON_HOST[0])
    assert not isinstance(table, str)
    with dispatch.use_kernels(ON_HOST[0], Spying(table)):
        for form in quick():
            smoke.tried(form, "cpu")
    of_the_same_kernels = {"gram", "combine", "finite", "merge_count_varied"}
    assert {*dispatch.RULES, *cuda.KERNELS, *triton.KERNELS} - tried <= of_the_same_kernels


def wrong(*outputs: torch.Tensor | float) -> tuple[torch.Tensor | float, ...]:
    return tuple(t * 1.001 if isinstance(t, float) or t.is_floating_point() or t.is_complex() else t for t in outputs)


@pytest.mark.parametrize(("op", "form"), [
    ("eigh", "eigh 33 float32"), ("svd", "svd 30x30 float64"), ("chain", "chain product r=16"),
    ("similarity", "similarity r=16"), ("tucker", "tucker"), ("difference_products", "difference_products fp32"),
])  # fmt: skip
def test_a_wrong_kernel_is_found(op: str, form: str) -> None:
    table = dispatch.kernels(ON_HOST[0])
    assert not isinstance(table, str)
    right = table[op]
    spoiled = Kernel(lambda *arguments: wrong(*right.launch(*arguments)), right.supports)
    assert "failed" not in smoke.tried(FORMS[form], "cpu")
    with dispatch.use_kernels(ON_HOST[0], {**table, op: spoiled}):
        row = smoke.tried(FORMS[form], "cpu")
    assert "allowed are" in row["failed"] and row["error"] > row["allowed"]


def test_a_pass_that_leaves_something_out_is_found() -> None:
    """Results are NaN before, and NaN is no small error."""
    table = dispatch.kernels(ON_HOST[0])
    assert not isinstance(table, str)
    for op, form in (("gram_pass", "gram B bf16 r=16+16"), ("combine_pass", "combine A fp16 32 columns, 2 terms")):
        nothing = Kernel(lambda jobs: None, dispatch.always)
        with dispatch.use_kernels(ON_HOST[0], {**table, op: nothing}):
            assert "an error of nan" in smoke.tried(FORMS[form], "cpu")["failed"]


def test_the_worst_of_several() -> None:
    nan = float("nan")
    assert worst(Found(1.0, 2.0), Found(3.0, 12.0)) == Found(1.0, 2.0)
    assert not worst(Found(1.0, 2.0), Found(nan, 1.0)).is_right
    assert Found(0.0, 0.0).is_right


def test_processes_that_die_are_told(tmp_path: Path) -> None:
    """As the command does it: rows of those that ended, a sentence for those that did not."""
    script = """
import os, signal, sys
from fastlora.bench.gpu import forms, smoke
def dies(device): os.kill(os.getpid(), signal.SIGSEGV)
def raises(device): raise RuntimeError("an illegal access\\nmore")
found = {"eigh 5 float32": forms.all_forms()["eigh 5 float32"]}
found |= {name: forms.Form(name, check) for name, check in (("dies", dies), ("raises", raises))}
smoke.all_forms = lambda *_: found
sys.exit(smoke.main())
"""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", script, "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = {row["form"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["dies"]["failed"] == "ended by SIGSEGV"
    assert rows["raises"]["failed"] == "RuntimeError: an illegal access"
    assert rows["eigh 5 float32"]["error"] <= rows["eigh 5 float32"]["allowed"] and len(rows) == 3
