"""torch's own kernels for CUDA tensors, on the CPU over the same memory, in the order of the streams.

Every kernel that torch registers for CUDA is replaced, but for those that only make or view memory. Shapes of results
come from the meta device, so that no value is looked at before its turn.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import streams
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

MEMORY = {
    "empty.memory_format", "empty_strided", "as_strided", "view", "view.dtype", "_reshape_alias", "unfold", "resize_",
    "set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "record_stream",
    "is_pinned", "_pin_memory", "alias", "view_as_real", "view_as_complex", "is_set_to", "detach",
}  # fmt: skip
# Sizes of their results depend on values, as do numbers.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
MIXING = {"index.Tensor", "index_put_", "_index_put_impl_"}  # take indices of the CPU
# What torch has for CUDA alone, by what it has for the CPU.
HERE = {"bmm.dtype": lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype))}

_library = torch.library.Library("aten", "IMPL")


def is_there(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def on_host(x: Tensor) -> Tensor:
    """A CPU tensor over the same memory that owns none of it."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    whole = torch.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
    place = whole.untyped_storage(), x.storage_offset(), x.size(), x.stride()
    return torch.empty(0, dtype=x.dtype).set_(*place)


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """As CUDA does: from pageable memory before it returns, to the host only after waiting unless it is pinned."""
    to, from_ = on_host(target), on_host(source)
    there = is_there(target), is_there(source)
    host = None if all(there) else source if there[0] else target
    pinned = host is not None and streams.is_pinned(host)
    if there[0] and not there[1] and not pinned:
        if streams.is_capturing():
            raise RuntimeError("rehearsal: a copy from pageable memory is captured")
        from_ = source.clone()
    streams.enqueue(lambda: to.copy_(from_), captured=(target, source), pinned=host if pinned else None)
    if not all(there) and not (pinned and non_blocking):
        streams.wait()
    return target


def _replacement(name: str, op: Any) -> Callable[..., Any]:
    waits = name in WAITING or any("Tensor" not in str(r.type) for r in op._schema.returns)
    places = [str(a.type) == "Tensor" for a in op._schema.arguments]

    def run(*arguments: Any, **options: Any) -> Any:
        # torch gives a tensor that stands for a number as the number, which not every op takes back.
        numbers = [of and isinstance(x, bool | int | float) for x, of in zip(arguments, places, strict=False)]
        arguments = tuple(torch.tensor(x) if number else x for x, number in zip(arguments, numbers, strict=True))
        for x in tree_leaves((arguments, options)):
            if isinstance(x, Tensor) and not is_there(x) and x.dim() and name not in MIXING:
                raise RuntimeError(f"aten::{name}: a CPU tensor {tuple(x.shape)} meets tensors on the device")
        options.pop("pin_memory", None)
        originals: dict[int, Tensor] = {}
        held = tree_map(lambda x: _held(x, originals), (arguments, options))
        if waits or (name == "index.Tensor" and any(x.dtype == torch.bool for x in originals.values())):
            streams.wait()
            return tree_map(_placed, op(*held[0], **held[1]))
        metas: dict[int, Tensor] = {}
        shaped = tree_map(lambda x: _shaped(x, originals, metas), held)
        targets: list[Tensor | None] = []
        found = tree_map(lambda x: _result(x, metas, targets), op(*shaped[0], **shaped[1]))

        def work() -> None:
            done = HERE.get(name, op)(*held[0], **held[1])
            results = [x for x in tree_leaves(done) if isinstance(x, Tensor)]
            for result, target in zip(results, targets, strict=True):
                if target is not None:
                    target.copy_(result)

        streams.enqueue(work, captured=(arguments, options, found))
        return found

    return run


def _held(x: Any, originals: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor) and is_there(x):
        found = on_host(x)
        originals[id(found)] = x
        return found
    if isinstance(x, torch.Generator):
        return None
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _shaped(x: Any, originals: dict[int, Tensor], metas: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        found = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
        if id(x) in originals:
            metas[id(found)] = originals[id(x)]
        return found
    return torch.device("meta") if isinstance(x, torch.device) else x


def _result(x: Any, metas: dict[int, Tensor], targets: list[Tensor | None]) -> Any:
    """The tensor that is returned, and where its values go: nowhere where the op itself writes into an argument."""
    if not isinstance(x, Tensor):
        return x
    own = metas.get(id(x))
    if own is not None and own.shape == x.shape:
        targets.append(None)
        return own
    own = (
        torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda") if own is None else own.resize_(x.shape)
    )
    targets.append(on_host(own))
    return own


def _placed(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    found = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
    on_host(found).copy_(x)
    return found


def install() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each kernel is said to be replaced
        _library.impl("copy_", copy_, "CUDA")
        for full in torch._C._dispatch_get_all_op_names():
            name = full.removeprefix("aten::")
            if (
                full == name
                or name in MEMORY | {"copy_"}
                or not has(full, "CUDA")
                or has(full, "CompositeImplicitAutograd")
            ):
                continue
            base, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if op is not None:
                _library.impl(name, _replacement(name, op), "CUDA")
    torch.cuda._sleep = lambda cycles: None  # every piece of work is late as it is
