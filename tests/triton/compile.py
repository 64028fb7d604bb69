"""Compiles the Triton kernels for GPUs that need not be there and counts what they take.

    python tests/triton/compile.py [--triton FOLDER] [--all] [--newest] [--write]

Prints one JSON object: for every kernel, specialisation and architecture its registers, stack, shared memory and the
instructions that say whether it does what it claims. ``--triton``: a folder with another version of Triton.
``--all``: awkward specialisations too. ``--newest``: for the newest architecture alone. ``--write`` puts the limits
into limits.json: what this version took, with a margin. Limits only grow: remove the file to begin anew, then run it
for every version.

It runs in a process of its own: one process cannot interpret kernels and compile them too.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMITS = HERE / "limits.json"
ARCHITECTURES = (80, 90)
FP32, FP16, BF16 = 0, 2, 3  # dtype codes
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "DFMA", "LDL", "STL", "ATOM", "RED", "STG.E.U16")


def folder_argument() -> str | None:
    return sys.argv[sys.argv.index("--triton") + 1] if "--triton" in sys.argv else None


def cases(every: bool) -> Iterator[tuple[str, Any]]:
    """``(name, launch)``: the specialisations that pools of real adapters use; ``every``: and those of awkward ones."""
    for side, rows in (("B", False), ("A", True)):
        yield from gram_cases(side, rows, every)
        yield from combine_cases(side, rows, every)
    yield from merge_cases(every)
    yield from similarity_cases(every)


def gram_cases(side: str, rows: bool, every: bool) -> Iterator[tuple[str, Any]]:
    from tritonkernels import gram

    tables = 1, "*i64", "*i64", "*fp64"
    common = {"rows": rows, "odd": False}
    for name, one_group in {"one": True, "two": False}.items():
        sums = partial(gram.half_sums_launch, *tables, rows=rows, one_group=one_group)
        yield f"half_sums {side} {name} bf16", sums(code=BF16, vector=8)
        if every:
            yield f"half_sums {side} {name} fp16", sums(code=FP16, vector=8)
            yield f"half_sums {side} {name} bf16 elements", sums(code=BF16, vector=1)
    if not rows:
        yield "repair_blocks bf16", gram.repair_blocks_launch(*tables, code=BF16)
        yield "write_blocks", gram.write_blocks_launch(*tables)
    yield f"exact_sums {side} fp32", gram.exact_sums_launch(*tables, code=FP32, **common)
    if every:
        yield f"exact_sums {side} mixed bytes", gram.exact_sums_launch(*tables, rows=rows, code=None, odd=True)


def combine_cases(side: str, rows: bool, every: bool) -> Iterator[tuple[str, Any]]:
    from tritonkernels import combine

    tables = 1, "*i64", "*i64", "*i64"
    half = partial(combine.half_results_launch, *tables[:3], rows=rows)
    stretches = (
        partial(combine.half_joint_launch, 1, "*i64", "*i64"),
        partial(combine.half_summed_launch, 1, "*i64", "*i64"),
    )
    for side_, launch in itertools.product(combine.STRETCHES if every else [16], stretches):
        for code, pieces in {BF16: "*bf16", FP16: "*fp32"}.items() if every else [(BF16, "*bf16")]:
            made = launch(pieces, rows=rows, code=code, out=code, vector=8, side=side_)
            yield f"{made.kernel.__name__} {side} {side_} {'bf16' if code == BF16 else 'fp16'}", made
    if not rows:
        yield "cut_coefficients bf16", combine.cut_coefficients_launch(*tables[:3], "*bf16", code=BF16)
        if every:
            yield "cut_coefficients fp16", combine.cut_coefficients_launch(*tables[:3], "*fp32", code=FP16)
    for wide, tall in combine.HALF_TILES.items() if every else [(16, combine.HALF_TILES[16])]:
        shape = {"tall": tall, "wide": wide, "vector": 8, "odd": False}
        yield f"half_results {side} {wide} bf16", half(code=BF16, out=BF16, **shape)
        if every:
            yield f"half_results {side} {wide} fp16", half(code=FP16, out=FP16, **shape)
    exact = partial(combine.exact_results_launch, *tables, rows=rows)
    yield f"exact_results {side} fp32", exact(code=FP32, out=FP32, odd=False)
    if not every:
        return
    for odd, (tall, wide) in combine.ROUGH_TILES.items():
        made = half(code=BF16, out=BF16, tall=tall, wide=wide, vector=1, odd=odd)
        yield f"half_results {side} {wide} bf16 {'bytes' if odd else 'elements'}", made
    yield f"exact_results {side} bf16", exact(code=FP32, out=BF16, odd=False)
    yield f"exact_results {side} mixed bytes", exact(code=None, out=FP32, odd=True)
    extreme = combine.extreme_results_launch(*tables, rows=rows, code=BF16, out=BF16, odd=False)
    yield f"extreme_results {side} bf16", extreme


def merge_cases(every: bool) -> Iterator[tuple[str, Any]]:
    from tritonkernels.merge_tiles import merge_tile_launch

    tables = "*i64", "*fp64", "*fp64", "*i64"
    kinds = {"ties": (1, False, 1, True), "dare": (2, False, 0, False)}
    if every:
        kinds |= {"breadcrumbs": (1, True, 1, False), "della": (3, False, 2, True), "sce": (4, False, 1, True)}
    for double in (False, True) if every else (False,):
        for name, (trim, high, elect, shares) in kinds.items():
            out = "*fp64" if double else "*fp32"
            made = merge_tile_launch(
                tables, out, "*i8", (8, 4096, 4096), (0, 4096),
                double=double, trim=trim, high=high, elect=elect, shares=shares,
            )  # fmt: skip
            yield f"merge_tile {name} {out[1:]}", made


def similarity_cases(every: bool) -> Iterator[tuple[str, Any]]:
    from tritonkernels.similarity import compare_tiles_launch

    tables = "*fp32", "*fp32", "*fp32", "*i64", "*fp64", "*fp64"
    for rank in (8, 16, 64) if every else (8,):
        yield f"compare_tiles {rank}", compare_tiles_launch(1, *tables, (4096, 4096, 6400, 400), rank=rank)


def compiled(launch: Any, architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    names = kernel.arg_names
    given = ["i32" if isinstance(a, int) else a for a in launch.arguments]
    signature = {n: given[i] if i < len(given) else "constexpr" for i, n in enumerate(names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in launch.constants.items()},
        # What the just-in-time compiler sees of tables that begin at 16-byte boundaries.
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(given) if a.startswith("*")},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(made: Any, folder: Path) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])

    def dump(what: str) -> str:
        env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        command = [str(tools / "cuobjdump"), f"--dump-{what}", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    found = re.search(r"REG:(\d+) STACK:(\d+)", dump("resource-usage"))
    assert found is not None
    code = dump("sass")
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS}
    counts["LDG.E.128 or LDGSTS"] = len(re.findall(r"\bLDG\.E\.128|\bLDGSTS", code))
    shared = int(made.metadata.shared)
    ftz = len(re.findall(r"\.ftz", made.asm["ptx"]))  # instructions that flush denormals
    taken = {"registers": int(found[1]), "stack": int(found[2]), "shared": shared, "warps": made.metadata.num_warps}
    return {**taken, "flushing": ftz, **counts}


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(HERE.parents[1]))
    if folder := folder_argument():
        sys.path.insert(0, folder)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TRITON_CACHE_DIR"] = temporary
        import triton

        rows = {
            f"sm_{architecture} {name}": resources(compiled(launch, architecture), Path(temporary))
            for architecture in (ARCHITECTURES[-1:] if "--newest" in sys.argv else ARCHITECTURES)
            for name, launch in cases("--all" in sys.argv)
        }
    if "--write" in sys.argv:
        write_limits(rows)
    print(json.dumps({"version": triton.__version__, "kernels": rows}))


def write_limits(rows: dict[str, dict[str, int]]) -> None:
    """Registers with a margin of an eighth (compilers differ), up to the most there are; shared memory as it is."""
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    for name, row in rows.items():
        before = limits.get(name, {"registers": 0, "shared": 0})
        registers = min(255, -(-row["registers"] * 9 // 64) * 8)
        limits[name] = {
            "registers": max(before["registers"], registers),
            "shared": max(before["shared"], row["shared"]),
        }
    LIMITS.write_text(json.dumps(limits, indent=1) + "\n")


if __name__ == "__main__":
    main()
