"""What can be wrong with ``adapter_model.bin``, a pickle in an archive."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import torch
from cases import OLD_WEIGHTS, WEIGHTS, Case, flipped


class Payload:
    """Leaves a file behind when it is unpickled, which must never happen."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


class Call:
    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def torch_tensors(case: Case) -> dict[str, torch.Tensor]:
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {e.name: torch.frombuffer(bytearray(e.data), dtype=kinds[e.dtype]).reshape(e.shape) for e in case.entries}


def saved(value: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def rezipped(raw: bytes, **edits: Any) -> bytes:
    """A zip archive again, with another pickle or compression."""
    source, out = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(out, "w", edits.get("compression", zipfile.ZIP_STORED)) as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = edits.get("pickle", content) + bytes(edits.get("padding", 0))
            target.writestr(zipfile.ZipInfo(info.filename), content, target.compression)  # without the time of day
    return out.getvalue()


def torch_file(case: Case, rng: random.Random) -> None:
    tensors: dict[str, Any] = dict(torch_tensors(case))
    first = next(iter(tensors))
    choice = rng.choice(["sound", "flips", "flips", "flips", "cut", "payload", "value", "container", "bomb", "strides",
                         "legacy", "legacy flips", "pickle", "views"])  # fmt: skip
    marker = f"fastlora-fuzz-payload-{case.seed}"
    if choice == "payload":
        tensors[first] = Payload(marker)
    elif choice == "value":
        tensors[first] = rng.choice([
            3, None, "x", [1], Call(bytearray, (1 << 40,)), Call(torch.empty, (1 << 40,)), Call(eval, ("1",)),
            b"x" * 10,
            torch.zeros(3, 6).to_sparse(), torch.zeros(3, 6, dtype=torch.complex64), torch.empty(3, 6, device="meta"),
            torch.zeros(3, 6, dtype=torch.int32), torch.quantize_per_tensor(torch.zeros(3, 6), 0.1, 0, torch.qint8),
            torch.nn.Parameter(torch.zeros(3, 6)), torch.zeros(()), torch.zeros(3, 6, requires_grad=True),
        ])  # fmt: skip
    elif choice == "strides":
        tensors[first] = torch.zeros(1).expand(*rng.choice([(3, 6), (1 << 20, 1 << 20), (1 << 40,), (3, 1 << 33)]))
    elif choice == "views":
        tensors[first] = torch.zeros(100)[5:23].reshape(6, 3).T
    value: Any = tensors
    if choice == "container":
        value = rng.choice([[tensors], {"state_dict": tensors}, {3: torch.zeros(2)}, tensors[first], None, {}, 7])
    raw = saved(value, legacy=choice.startswith("legacy"))
    if choice.endswith("flips"):
        raw = flipped(raw, rng, rng.choice([1, 2, 10, 50]))
    elif choice == "cut":
        raw = raw[: rng.randrange(len(raw))]
    elif choice == "bomb":
        raw = rezipped(raw, compression=zipfile.ZIP_DEFLATED, padding=rng.choice([0, 1 << 20]))
    elif choice == "pickle":
        raw = rezipped(raw, pickle=rng.choice([
            b"", b"\x80\x02.", b"\x80\x02}.", b"N.", b"(" * 10**5, b"\x80\x02" + b"]" * 10**5 + b".", b"\x80\x02h\x09.",
            b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.", b"\x80\x02ctorch\nload\n.",
            b"\x80\x02X\xff\xff\xff\x7fa.",
            b"\x80\x02}q\x00h\x00h\x00s.", b"\x80\x02K\x01Q.", b"\x80\x02\x8a\xff" + b"a" * 255 + b".", b"\x80\x02)R.",
            pickle.dumps({"a": 1}, 2), pickle.dumps({"a": range(10**9)}, 2),
            b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        ]))  # fmt: skip
    case.numbers = choice in ("sound", "views")
    case.must_refuse = choice in ("payload", "container", "pickle", "bomb")

    def place(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / OLD_WEIGHTS).write_bytes(raw)

    case.special = place
    case.about = OLD_WEIGHTS
