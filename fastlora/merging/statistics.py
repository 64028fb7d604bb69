"""``fl.statistics``: the inputs of adapted modules, collected from a running torch model by forward hooks."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlora.errors import InputError, NonFiniteError
from fastlora.merging.input_rows import ROWS, InputRows, Statistics
from fastlora.ops.finite import is_finite
from fastlora.runtime.progress import track

PEFT_PREFIX = "base_model.model."
TOLD = 3
"""Names that a message lists."""


def statistics(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    modules: Iterable[str],
    *,
    tokens: int = 256,
    seed: int = 0,
) -> Statistics:
    """Runs a model on unlabelled batches and keeps some of the vectors that its modules are given.

    Every module keeps the same places of the batches: ``tokens`` of all that were seen, each with the same chance.
    Places that an ``attention_mask`` of the batch leaves out are none of them. Modules with one input share its rows.

    Args:
        model: a torch model, of transformers or any other. With an adapter on it (PEFT's model too), the inputs are
            those that the adapter saw, as SSR wants them; without, those of the base model.
        batches: ``{adapter: batches}``: what each adapter of a pool is for, by the names of the pool. A batch is a
            mapping of keyword arguments of the model, a tuple of arguments, or one argument. Batches alone are those of
            an adapter called ``"adapter"``.
        modules: names of linear modules and convolutions in the model, such as ``pool.modules``.
        tokens: how many rows a module keeps, at least 1.
        seed: which ones.

    Returns:
        :class:`Statistics`, rows ``[N, m]`` on the CPU with ``N ≤ tokens``. Those of a convolution are the patches that
        its kernel sees, ``m = channels·Πkernel``.

    Raises:
        InputError: a module that the model lacks, or of a kind that has no such inputs; a module that no batch reached;
            batches that are empty or cannot be given to the model.
        NonFiniteError: inputs that hold NaN or Inf.

    Cost: one forward pass a batch, without gradient and in evaluation mode, and ``tokens·m`` numbers for every distinct
    input of the model. Where the products of the ``N`` rows of all adapters take no more room than the rows (``N ≤
    m/8`` in half precision, ``m/4`` in float32), they are computed too, ``N²·m`` operations in float64.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"statistics: tokens={tokens!r} must be a whole number of at least 1")
    named = dict(batches) if isinstance(batches, Mapping) else {"adapter": batches}
    if not named:
        raise InputError("statistics: there are no batches; give {adapter: batches}")
    targets = _targets(model, modules)
    rows = {name: _collected(model, name, given, targets, tokens, seed) for name, given in named.items()}
    return Statistics(rows).prepare()


def _targets(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules by the names that adapters have for them: those of PEFT's models without its prefix."""
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise InputError("statistics: no modules are named; give `pool.modules`")
    known = {n.removeprefix(PEFT_PREFIX): m for n, m in model.named_modules(remove_duplicate=False)}
    missing = [n for n in wanted if n not in known]
    if missing:
        linear = [n for n, m in known.items() if isinstance(m, nn.Linear)]
        raise InputError(
            f"the model has {len(wanted) - len(missing)} of the {len(wanted)} modules; it lacks "
            f"{', '.join(missing[:TOLD])}{', …' if len(missing) > TOLD else ''}, and has for example "
            f"{', '.join(linear[:TOLD]) or 'no linear module'}. Give the model that the adapters were trained on, or "
            "names as it has them (`Pool.load(…, rename=…)`)"
        )
    for name in wanted:
        _require_rows(name, known[name])
    return {name: known[name] for name in wanted}


def _inner(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrapper."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def _require_rows(name: str, module: nn.Module) -> None:
    inner = _inner(module)
    is_linear = isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D"
    is_image = isinstance(inner, nn.Conv1d | nn.Conv2d) and inner.groups == 1 and inner.padding_mode == "zeros"
    if not (is_linear or is_image):
        raise InputError(
            f"module {name!r} is a {type(inner).__name__}; inputs are collected of linear modules and of convolutions "
            "in one or two dimensions (groups=1, padding with zeros). Leave it out of `modules`"
        )


@dataclass(frozen=True, eq=False)
class _Sample:
    """Rows that were kept of the first ``seen`` places, and the chance of each: those of the smallest are kept."""

    seen: int
    places: Tensor  # int64 [N], in rising order
    rows: Tensor  # [N, m]


class _Collector:
    """What the hooks of one run write to. Modules that are given one tensor in all batches have one sample."""

    def __init__(self, tokens: int, seed: int) -> None:
        self.tokens, self.seed = tokens, seed
        self.samples: dict[str, _Sample] = {}
        self.mask: Tensor | None = None
        self._met: list[tuple[weakref.ref[Tensor], nn.Module | None, _Sample | None, _Sample]] = []

    def next_batch(self, mask: Tensor | None) -> None:
        self.mask = mask
        self._met.clear()

    def hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        """Takes the input of a module before it runs."""
        inner = _inner(module)
        geometry = inner if isinstance(inner, nn.Conv1d | nn.Conv2d) else None

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if not isinstance(x, Tensor):
                raise InputError(f"module {name!r} is given no tensor, so it has no rows; leave it out of `modules`")
            before = self.samples.get(name)
            for met, of, old, new in self._met:
                if met() is x and of is geometry and old is before:
                    self.samples[name] = new
                    return
            after = self._extended(name, before, x, geometry)
            self._met.append((weakref.ref(x), geometry, before, after))
            self.samples[name] = after

        return take

    def _extended(self, name: str, before: _Sample | None, x: Tensor, geometry: nn.Module | None) -> _Sample:
        rows = _rows_of(x, geometry)
        places = torch.arange(len(rows))
        if self.mask is not None and geometry is None and self.mask.shape == x.shape[:-1]:
            places = places[self.mask.flatten().bool().cpu()]
        seen = 0 if before is None else before.seen
        numbers = torch.arange(seen, seen + len(places))
        held = torch.empty(0, dtype=torch.int64) if before is None else before.places
        chosen = torch.cat([held, numbers])
        order = torch.from_numpy(_chances(chosen.numpy(), self.seed)).argsort(stable=True)[: self.tokens]
        kept = chosen[order].sort().values
        new = rows[places[kept[kept >= seen] - seen].to(rows.device)].detach()
        new = new.to("cpu", new.dtype if new.dtype in ROWS else torch.float32)
        if not is_finite(new):
            raise NonFiniteError(f"the inputs of module {name!r} hold NaN or Inf; check the model and the batches")
        if before is not None:
            new = torch.cat([before.rows[torch.isin(held, kept)].to(new.dtype), new])
        return _Sample(seen + len(places), kept, new)


def _rows_of(x: Tensor, geometry: nn.Module | None) -> Tensor:
    """The vectors that a weight is multiplied with: ``[rows, m]``."""
    if geometry is None:
        return x.reshape(-1, x.shape[-1])
    assert isinstance(geometry, nn.Conv1d | nn.Conv2d)
    kernel, dilation, stride = geometry.kernel_size, geometry.dilation, geometry.stride
    images = x if x.dim() == len(kernel) + 2 else x[None]
    around = [0, 0] * len(kernel)  # as torch counts: the last side first
    for i, (size, step) in enumerate(zip(reversed(kernel), reversed(dilation), strict=True)):
        if geometry.padding == "same":
            total = step * (size - 1)
            around[2 * i : 2 * i + 2] = total // 2, total - total // 2
        elif not isinstance(geometry.padding, str):
            around[2 * i : 2 * i + 2] = [geometry.padding[-1 - i]] * 2
    images = functional.pad(images, around)
    if isinstance(geometry, nn.Conv1d):  # as images of one row
        images, kernel, dilation, stride = images[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    patches = functional.unfold(images, kernel, dilation=dilation, stride=stride)  # [batch, channels·kernel, places]
    return patches.mT.reshape(-1, patches.shape[1])


def _chances(places: np.ndarray[Any, np.dtype[np.int64]], seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for every place, as good as random: SplitMix64 of its index (Steele, Lea, Flood 2014), from where it
    takes the seed to."""
    start = _mixed(np.array([seed % 2**64], np.uint64))
    return (_mixed(places.astype(np.uint64) ^ start) >> np.uint64(1)).astype(np.int64)


def _mixed(z: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    with np.errstate(over="ignore"):
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _collected(
    model: nn.Module, name: str, batches: Iterable[Any], targets: Mapping[str, nn.Module], tokens: int, seed: int
) -> InputRows:
    collector = _Collector(tokens, seed)
    handles = [m.register_forward_pre_hook(collector.hook(n, m), with_kwargs=True) for n, m in targets.items()]
    count = 0
    try:
        with _evaluating(model):
            for batch in track(batches, f"inputs for {name}") if isinstance(batches, Sequence) else batches:
                collector.next_batch(_mask(batch))
                _run(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise InputError(f"statistics: there are no batches for {name!r}")
    idle = [n for n in targets if n not in collector.samples or not collector.samples[n].seen]
    if idle:
        raise InputError(
            f"no batch of {name!r} reached {', '.join(idle[:TOLD])}{', …' if len(idle) > TOLD else ''}: {len(idle)} of "
            f"{len(targets)} modules have no inputs; leave them out of `modules`, or give batches that use them"
        )
    return _shared(collector.samples)


def _shared(samples: Mapping[str, _Sample]) -> InputRows:
    """One site for all modules of one sample, called by the first of them."""
    first: dict[int, str] = {}
    sites = {module: first.setdefault(id(sample), module) for module, sample in samples.items()}
    own = {site: samples[site] for site in first.values()}
    return InputRows({s: x.rows for s, x in own.items()}, sites, {s: x.seen for s, x in own.items()})


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, list | tuple):
        model(*batch)
    else:
        model(batch)


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradient; afterwards as it was."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
