"""Damages single files of every family and dialect, and holds what is read against a plain second reader.

    python tests/fuzz/single_files.py --count 20000 --seed 1 --json tests/fuzz/single_files.json

A case is a sound file of ``tests/dialects/files.py``, maybe with modules of LyCORIS, biases and magnitudes, and one or
two things that are wrong with it. It is a violation if it is read and a number differs from the second reader's, if a
module of it is missing in what was read, or if anything but an error of fastlora comes out. Cases run in a process with
bounds on time and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1])]

import plain_reader  # noqa: E402
from run import ADDRESS_SPACE, GROWTH, MULTIPLE, Violation, peak, resident, status, version  # noqa: E402

import fastlora as fl  # noqa: E402
from fastlora.errors import FastloraError, NonFiniteError, UnsupportedAdapter  # noqa: E402
from tests.dialects.files import ALPHAS, CASES, sample  # noqa: E402

LIMIT_S = 20
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]
CLOSE = 1e-6
"""Of the largest element: dense modules of LyCORIS are rounded to float32."""


@dataclass
class Case:
    """A file: ``tensors`` and ``metadata`` are written, then ``edit`` changes the bytes. ``modules``: as the sound file
    has them, ``{stem: module}``. ``family``, ``rank``: what it is read with."""

    seed: int
    kind: str
    tensors: dict[str, Tensor]
    modules: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)
    family: str | None = None
    rank: int | None = None
    suffix: str = "safetensors"
    edit: Callable[[bytes], bytes] = bytes


Damage = Callable[[Case, random.Random], None]


def stem_of(name: str) -> str:
    found = plain_reader.split(name)
    return name if found is None else found[0]


def any_stem(case: Case, rng: random.Random) -> str:
    return rng.choice(list(case.modules))


def drop(case: Case, rng: random.Random) -> None:
    del case.tensors[rng.choice(list(case.tensors))]


def rename(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    old, new = rng.choice([
        ("lora_down", "lora_up"), ("lora_up", "lora_down"), ("lora_A", "lora_B"), (".weight", ""), (".weight", ".bias"),
        ("lora_", "LORA_"), (".alpha", ".alpha.x"), ("lora_unet_", "lora_te_"), ("lora_unet_", "lora_unet__"),
        ("lora_unet_", ""), ("diffusion_model.", "model.diffusion_model."), ("transformer.", "unet."),
        ("blocks", "block"), ("_0_", "_1_"), (".0.", ".99."), ("to_q", "to_k"), ("attn", "atn"),
        (".weight", ".x.weight"),
        ("lora_A", "lora_A.other"), (".alpha", ".scale"), (".alpha", ".scalar"), ("lora_up.weight", "diff"),
        ("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora.up.weight"), ("_", "."), (".", "_"),
    ])  # fmt: skip
    tensor = case.tensors.pop(name)
    case.tensors[name.replace(old, new) or "x"] = tensor


def wrong_shape(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    tensor = case.tensors[name]
    with contextlib.suppress(RuntimeError, IndexError):
        case.tensors[name] = rng.choice([
            lambda t: t.flatten(), lambda t: t.mT, lambda t: t[:-1], lambda t: t[None], lambda t: t[..., None],
            lambda t: t[..., None, None], lambda t: t[:, :-1], lambda t: t[:0], lambda t: t.reshape(1, -1),
            lambda t: t.reshape(-1, 1), lambda t: torch.cat([t, t]), lambda t: torch.cat([t, t], 1),
            lambda t: t.repeat(200, 1), lambda t: t.flatten(1),
        ])(tensor).contiguous()  # fmt: skip


def wrong_dtype(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    dtypes = [*DTYPES, torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2]
    case.tensors[name] = case.tensors[name].float().to(rng.choice(dtypes))


def values(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    tensor = case.tensors[name].clone()
    value = rng.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-30, 1e30, 65504.0, 1e-40])
    flat = tensor.reshape(-1)
    with contextlib.suppress(RuntimeError, OverflowError, IndexError, ValueError):
        flat[:] = value if rng.random() < 0.5 else flat
        flat[rng.randrange(len(flat))] = value
    case.tensors[name] = flat.reshape(tensor.shape)


def alphas(case: Case, rng: random.Random) -> None:
    stem = any_stem(case, rng)
    case.tensors[f"{stem}.alpha"] = rng.choice([
        torch.tensor(0.0), torch.tensor(-3.0), torch.tensor(7), torch.tensor([2.0]), torch.ones(2), torch.ones(1, 1),
        torch.tensor(torch.nan), torch.tensor(1e30), torch.tensor(True), torch.tensor(0.3, dtype=torch.bfloat16),
        torch.tensor(2.0, dtype=torch.float8_e4m3fn), torch.zeros(0),
    ])  # fmt: skip


def twice(case: Case, rng: random.Random) -> None:
    """The same module again under another spelling of its factors, or under another prefix."""
    stem = any_stem(case, rng)
    names = [n for n in case.tensors if stem_of(n) == stem]
    for name in names:
        copy = case.tensors[name].clone()
        new = rng.choice([
            name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"), name.replace("lora_A", "lora_down"),
            name.replace("lora_unet_", "lycoris_"), name.replace("diffusion_model.", ""),
            name.replace("diffusion_model.", "transformer."), f"transformer.{case.modules[stem]}.lora_A.weight",
        ])  # fmt: skip
        case.tensors.setdefault(new, _times(copy, rng.choice([1, 1, 2])))


def _times(tensor: Tensor, number: int) -> Tensor:
    return (tensor.float() * number).to(tensor.dtype)


def beside(case: Case, rng: random.Random) -> None:
    stem = any_stem(case, rng)
    rows = next((t.shape[0] for n, t in case.tensors.items() if n.startswith(f"{stem}.") and "up" in n[-14:]), 24)
    name, tensor = rng.choice([
        ("diff_b", torch.ones(rows)), ("diff_b", torch.ones(3)), ("lora_B.bias", torch.ones(rows)),
        ("w_norm", torch.ones(rows)),
        ("dora_scale", torch.ones(rows, 1)), ("dora_scale", torch.ones(1, 7)), ("dora_scale", torch.ones(rows)),
        ("scalar", torch.tensor(2.0)), ("scale", torch.tensor(0.5)), ("oft_blocks", torch.ones(2, 2, 2)),
        ("diff_m", torch.ones(2)),
        ("a1.weight", torch.ones(2, 2)), ("set_weight", torch.ones(rows)), ("reshape_weight", torch.ones(2)),
        ("on_input", torch.ones(1)), ("unknown", torch.ones(1)), ("lora_mid.weight", torch.ones(2, 2, 3, 3)),
    ])  # fmt: skip
    case.tensors[f"{stem}.{name}"] = tensor


def lycoris(case: Case, rng: random.Random) -> None:
    """A module in a form of LyCORIS, whose shapes fit or nearly fit."""
    stem = any_stem(case, rng)
    for name in [n for n in case.tensors if stem_of(n) == stem]:
        del case.tensors[name]
    r, n, m, p = rng.randint(1, 4), rng.choice([8, 24]), rng.choice([8, 24]), rng.choice([1, 2, 4])
    forms: list[dict[str, tuple[int, ...]]] = [
        {"hada_w1_a": (n, r), "hada_w1_b": (r, m), "hada_w2_a": (n, r), "hada_w2_b": (r, m)},
        {"hada_w1_a": (n, r), "hada_w1_b": (r, m), "hada_w2_a": (n, 2), "hada_w2_b": (2, m)},
        {"hada_w1_a": (r, n), "hada_w1_b": (r, m), "hada_t1": (r, r, 3, 3)}
        | {"hada_w2_a": (r, n), "hada_w2_b": (r, m), "hada_t2": (r, r, 3, 3)},
        {"lokr_w1": (p, p), "lokr_w2": (n, m)},
        {"lokr_w1": (p, 2), "lokr_w2": (n, m, 3, 3)},
        {"lokr_w1": (p, p), "lokr_w2_a": (n, r), "lokr_w2_b": (r, m)},
        {"lokr_w1_a": (p, r), "lokr_w1_b": (r, p), "lokr_w2_a": (n, r), "lokr_w2_b": (r, m)},
        {"lokr_w1": (p, p), "lokr_t2": (r, r, 3, 3), "lokr_w2_a": (r, n), "lokr_w2_b": (r, m)},
        {"lora_up.weight": (n, r, 1, 1), "lora_down.weight": (r, m, 1, 1), "lora_mid.weight": (r, r, 3, 3)},
        {"diff": (n, m)},
        {"diff": (n, m, 3, 3)},
        {"lokr_w1": (40, 40), "lokr_w2": (n, m)},
    ]
    shapes = rng.choice(forms)
    if rng.random() < 0.2:
        shapes.pop(rng.choice(list(shapes)))
    generator = torch.Generator().manual_seed(case.seed)
    case.tensors |= {f"{stem}.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}
    if rng.random() < 0.6:
        case.tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    if rng.random() < 0.3:
        case.rank = rng.randint(1, 8)


def metadata(case: Case, rng: random.Random) -> None:
    fields: object = rng.choice([
        {"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 2}, {"r": 0, "lora_alpha": 1}, {"r": "4"}, {"lora_alpha": 3},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}}, {"r": 4, "lora_alpha": None}, [], "x", None,
        {"r": 2, "lora_alpha": 4, "use_rslora": True}, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}},
        {"r": 2, "lora_alpha": 4, "use_dora": True}, {"r": 1 << 40, "lora_alpha": 1e308},
    ])  # fmt: skip
    named = {f"transformer.{k}": v for k, v in fields.items()} if isinstance(fields, dict) else fields
    case.metadata |= {"lora_adapter_metadata": json.dumps(named)}
    if rng.random() < 0.7:
        case.tensors = {k: t for k, t in case.tensors.items() if not k.endswith(".alpha")}
    if rng.random() < 0.3:
        case.metadata |= {"ss_network_alpha": rng.choice(["8", "nan", "x", ""]), "ss_base_model_version": "sd_v1"}


def flips(case: Case, rng: random.Random) -> None:
    """Bits of the header or of the data."""
    count, in_header = rng.choice([1, 2, 8]), rng.random() < 0.5
    places = [rng.random() for _ in range(count)]

    def edit(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        first, end = (0, min(start, len(raw))) if in_header else (min(start, len(raw) - 1), len(raw))
        damaged = bytearray(raw)
        for place in places:
            at = first + int(place * (end - first))
            damaged[at] ^= 1 << (at % 8)
        return bytes(damaged)

    case.edit = edit


def cut(case: Case, rng: random.Random) -> None:
    share, more = rng.random(), rng.choice([0, 0, 1, 4096])
    case.edit = lambda raw: raw + bytes(more) if more else raw[: int(share * len(raw))]


def other_family(case: Case, rng: random.Random) -> None:
    case.family = rng.choice(["sd15", "sdxl", "flux", "wan", "sd3", "nothing", ""])


DAMAGES: list[Damage] = [
    drop, rename, rename, rename, wrong_shape, wrong_shape, wrong_dtype, values, values, alphas, alphas, twice, beside,
    beside, lycoris, lycoris, lycoris, metadata, flips, flips, cut, other_family,
]  # fmt: skip


def make(seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(seed)
    family, dialect = rng.choice(CASES)
    alpha = rng.choice(list(ALPHAS.values()))
    ranks = rng.choice([(2, 4, 3), (1,), (4,)])
    file = sample(family, dialect, alpha, ranks, rng.choice(DTYPES), text=rng.random() < 0.3)
    keep = set(rng.sample(list(file.stems), rng.randint(1, len(file.stems))))
    modules = {stem: module for module, stem in file.stems.items() if module in keep}
    tensors = {k: t for k, t in file.tensors.items() if stem_of(k) in modules}
    case = Case(seed, "", tensors, modules, family=family if rng.random() < 0.4 else None)
    case.suffix = "bin" if rng.random() < 0.1 else "safetensors"
    chosen = rng.sample(DAMAGES, rng.choice([0, 1, 1, 1, 1, 2]))
    for damage in chosen:
        if case.tensors:
            damage(case, rng)
    case.kind = " + ".join(d.__name__ for d in chosen) or "sound"
    return case


def write(case: Case, folder: Path) -> Path:
    path = folder / f"style.{case.suffix}"
    tensors = {k: t.clone(memory_format=torch.contiguous_format) for k, t in case.tensors.items()}
    if case.suffix == "bin":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save

        path.write_bytes(case.edit(save(tensors, case.metadata or None)))
    return path


def check(case: Case, folder: Path) -> str:
    """The outcome of a case. Raises :class:`Violation`."""
    path = write(case, folder)
    before, size = resident(), path.stat().st_size
    try:
        adapter = fl.load(path, family=case.family, rank=case.rank)
    except FastloraError as error:
        text = str(error)
        if not text.isprintable() or len(text) > 2000 or (str(path) not in text and "family" not in text):
            raise Violation(f"an odd message: {text[:300]!r}") from None
        return {UnsupportedAdapter: "unsupported", NonFiniteError: "not finite"}.get(type(error), "refused")
    if peak() - before > GROWTH + MULTIPLE * size:
        raise Violation(f"{(peak() - before) >> 20} MiB of memory for {size} bytes")
    compare(case, adapter, path)
    return "read"


def compare(case: Case, adapter: fl.Adapter | fl.DoRA, path: Path) -> None:
    """Every module of the file, by what the file calls it."""
    form = adapter.base.form
    assert form is not None
    try:
        meant = plain_reader.read(path)
    except plain_reader.Damaged as error:
        raise Violation(f"accepted, but the second reader says: {error}") from None
    found = {form.stems[module]: module for module in adapter.updates}
    for stem, delta in meant.items():
        module = found.get(stem)
        if module is None:
            others = [m for m in adapter.updates if close(dense(adapter, m), delta)]
            if not others:
                raise Violation(f"{stem} is lost")
            continue
        if case.modules.get(stem, module) != module and form.family in (None, case.family) and case.family is not None:
            raise Violation(f"{stem} is {module} and not {case.modules[stem]}") if "other" not in case.kind else None
        if case.rank is not None and plain_reader.is_lycoris(path, stem):
            continue
        got = dense(adapter, module)
        if not close(got, delta) and not (len(delta) % 2 == 0 and close(torch.cat(got.chunk(2)[::-1]), delta)):
            raise Violation(f"{stem}: other numbers")
    extra = set(found) - set(meant)
    if extra:
        raise Violation(f"{sorted(extra)[0]} comes from nowhere")


def dense(adapter: fl.Adapter | fl.DoRA, module: str) -> Tensor:
    update = adapter.updates[module]
    left, right = update.B.stored, update.A.stored
    assert left is not None and right is not None
    return update.scaling * left.double() @ right.double()


def close(found: Tensor, meant: Tensor) -> bool:
    if found.shape != meant.shape:
        return False
    if not bool(meant.isfinite().all()):
        return True  # found when it is computed with
    return float((found - meant).abs().max()) <= CLOSE * float(meant.abs().max())


def one(seed: int, root: Path) -> tuple[int, str, str, str]:
    """``(seed, kind, outcome, violation or "")``."""
    case = make(seed)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        try:
            return seed, case.kind, check(case, Path(folder)), ""
        except Violation as error:
            return seed, case.kind, "violation", str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last))
            return seed, case.kind, "violation", f"{type(error).__name__}: {str(error)[:300]} ({where})"


def _work(connection: Connection, root: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bound = status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    while (seed := connection.recv()) is not None:
        connection.send(one(seed, root))


def run(seeds: range | list[int], root: Path) -> Iterator[tuple[int, str, str, str]]:
    """Every case, in a process that is replaced when it dies or hangs."""
    process, connection = None, None
    for seed in seeds:
        if process is None or connection is None:
            connection, other = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=_work, args=(other, root), daemon=True)
            process.start()
            other.close()
        try:
            connection.send(seed)
            if not connection.poll(LIMIT_S):
                raise EOFError
            yield connection.recv()
        except (EOFError, OSError):
            how = "took too long" if process.is_alive() else "the process died"
            process.kill()
            process = None
            yield seed, make(seed).kind, "violation", how
    if connection is not None and process is not None:
        connection.send(None)
        process.join(5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="numbers from SEED * 10,000,000 on")
    parser.add_argument("--replay", type=int, nargs="*", help="these numbers instead")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    first = options.seed * 10_000_000
    seeds = options.replay or range(first, first + options.count)
    outcomes: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    violations, versions, start = [], version(), time.monotonic()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        for seed, kind, outcome, violation in run(seeds, Path(root)):
            outcomes[outcome] += 1
            kinds.setdefault(kind.split(" + ")[0], Counter())[outcome] += 1
            if violation:
                violations.append({"seed": seed, "kind": kind, "what": violation})
                print(f"{seed} {kind}: {violation}", flush=True)
    seconds = time.monotonic() - start
    print(f"{sum(outcomes.values())} cases in {seconds:.0f} s: {dict(outcomes.most_common())}")
    if options.json:
        result = {
            "mutations": sum(outcomes.values()),
            "seeds": [first, first + options.count - 1],
            "outcomes": dict(outcomes.most_common()),
            "kinds": {k: dict(v.most_common()) for k, v in sorted(kinds.items())},
            "violations": violations,
            "seconds": round(seconds),
            **versions,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
