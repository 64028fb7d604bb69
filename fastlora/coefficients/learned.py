"""Learned coefficients: a model with adapters in factor form, ``y = Wx + Σ_k λ_k s_k B_k (A_k x)``, and ``λ`` trained.

Nothing of the size of ``W`` is made or copied; only ``λ`` is trained. AdaMerging (Yang et al., ICLR 2024) is the case
of entropy on unlabelled batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.coefficients.sites import Site, make_site
from fastlora.core.sums import combine_updates
from fastlora.decomposition.result import Decomposition
from fastlora.dipm.parts import refuse_extras
from fastlora.errors import InputError
from fastlora.runtime.progress import track

ComponentSources = Pool | Decomposition | Mapping[str, Adapter] | Sequence[Adapter]
"""What gives adapters to be weighed."""
Loss = Callable[[Any, Any], Tensor]


class LearnedMerge(nn.Module):
    """A base model and adapters whose coefficients ``λ`` are parameters.

    Works on the model in place, by forward hooks on the adapted modules, until :meth:`close` (or the end of a ``with``
    block) takes them off; the model's own weights are not changed or copied.

        with fl.LearnedMerge(model, pool, per="layer") as merge:
            merge.fit(batches)                   # entropy on unlabelled batches
            merge.adapter().save("merged")       # Σ λ_k ΔW_k, exactly

    Args:
        model: the base model, without adapters. Linear modules, transformers' ``Conv1D``, embeddings and convolutions
            can be adapted; others are refused by name.
        components: a pool, adapters by name, or a decomposition: of ``mode="pool"`` its shared and unique parts, of
            ``mode="pairs"`` the adapters and the shared part of every pair as extra vectors (Table 1 of DeVec).
        per: ``"task"``: one ``λ_k`` an adapter, ``coefficients [k]``; ``"layer"``: one for every adapter and adapted
            module, ``coefficients [modules, k]``.
        init: where ``λ`` starts; AdaMerging uses 0.3.
        clamp: keep the ``λ`` that are used in ``[0, 1]``, as AdaMerging does. Outside, the gradient is zero.

    Raises:
        InputError: a module that the model lacks, of another shape or of a kind that cannot be adapted here; biases or
            replaced modules among the components.

    Cost of a forward pass: ``2·(n + m)·Σr`` operations a row of input and module, beside the model's own. Factors are
    kept in float32 (float64 beside float64 weights), and their products are computed in it.
    """

    def __init__(
        self,
        model: nn.Module,
        components: ComponentSources,
        *,
        per: Literal["task", "layer"] = "task",
        init: float = 0.3,
        clamp: bool = True,
    ) -> None:
        super().__init__()
        if per not in ("task", "layer"):
            raise InputError(
                f"per={per!r} does not exist: use 'task' (one λ an adapter) or 'layer' (one a module, too)"
            )
        self.components = named_sources(components)
        refuse_extras(list(self.components.values()))
        self.per = per
        self.clamp = clamp
        self.model = model
        adapters = list(self.components.values())
        self.modules_adapted = list(dict.fromkeys(m for a in adapters for m, u in a.updates.items() if u.rank))
        targets = dict(model.named_modules(remove_duplicate=False))
        sites, hooked = [], []
        for path in self.modules_adapted:
            parent = targets.get(path.rpartition(".")[0])
            updates = [a.updates.get(path) for a in adapters]
            site = make_site(path, targets.get(path), parent, updates)
            sites.append(site)
            hooked.append(targets[path])
        self.sites = nn.ModuleList(sites)
        shape = (len(adapters),) if per == "task" else (len(sites), len(adapters))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.coefficients = nn.Parameter(torch.full(shape, float(init), device=device))
        self._handles = [
            module.register_forward_hook(self._hook(i, site), with_kwargs=True)
            for i, (module, site) in enumerate(zip(hooked, sites, strict=True))
        ]

    def _hook(self, index: int, site: Site) -> Callable[..., Tensor]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            used = self.used()
            x = args[0] if args else kwargs["input"] if "input" in kwargs else kwargs["x"]
            added: Tensor = site(x, used if self.per == "task" else used[index])
            return output + added.to(output.dtype)

        return add

    def used(self) -> Tensor:
        """``λ`` as the forward pass uses them: clamped, if at all."""
        return self.coefficients.clamp(0.0, 1.0) if self.clamp else self.coefficients

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own result, with the adapters in place."""
        return self.model(*args, **kwargs)

    @property
    def weights(self) -> dict[str, float] | dict[str, dict[str, float]]:
        """``{name: λ}``, or ``{module: {name: λ}}`` with ``per="layer"``."""
        values, names = self.used().detach().double().tolist(), list(self.components)
        if self.per == "task":
            return dict(zip(names, values, strict=True))
        rows = (dict(zip(names, row, strict=True)) for row in values)
        return dict(zip(self.modules_adapted, rows, strict=True))

    def adapter(self, name: str = "learned") -> Adapter:
        """``Σ_k λ_k ΔW_k`` with the ``λ`` as they are now, exactly, under a ``name``.

        Ranks add up; :func:`fastlora.compress` cuts them. No factor is read until the adapter is used.
        """
        adapters = list(self.components.values())
        values = self.used().detach().double().tolist()
        provenance: dict[str, object] = {
            "learned": self.weights,
            "of": {n: a.provenance for n, a in self.components.items()},
        }
        if self.per == "task":
            result = Adapter.weighted_sum(list(zip(values, adapters, strict=True)), name)
            return replace(result, provenance=provenance)
        result = Adapter.weighted_sum([(1.0, a) for a in adapters], name)
        updates = dict(result.updates)
        for module, row in zip(self.modules_adapted, values, strict=True):
            terms = [(w, a.updates[module]) for w, a in zip(row, adapters, strict=True) if module in a.updates]
            updates[module] = combine_updates(terms, module)
        return replace(result, updates=updates, provenance=provenance)

    def fit(
        self,
        batches: Iterable[Any] | Mapping[str, Iterable[Any]],
        loss: Loss | Mapping[str, Loss] | None = None,
        *,
        steps: int = 500,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> list[float]:
        """Trains ``λ`` with Adam; the defaults are AdaMerging's.

        Args:
            batches: gone through again and again until there were ``steps``, one a step; or ``{task: batches}``, of
                which every step takes one each and adds up their losses. A batch is a tensor, a tuple of arguments or a
                mapping of keyword arguments of the model.
            loss: ``loss(output, batch)`` returns a scalar; default: :func:`entropy` of the output's logits. With tasks,
                ``{task: loss}`` too.
            steps: how many steps Adam takes, at least 1.
            lr, betas: Adam's.

        Returns:
            The loss of every step, before it was taken. The model is in evaluation mode meanwhile (no dropout), and its
            own weights take no gradient; both are as before afterwards.

        Raises:
            InputError: batches that run out, a loss that is no finite scalar (``λ`` are then as before that step).

        Cost: one forward and one backward pass of the model a step and task.
        """
        if steps < 1:
            raise InputError(f"fit: steps={steps} must be at least 1")
        tasks = dict(batches) if isinstance(batches, Mapping) else {"": batches}
        losses = {task: _loss_of(loss, task) for task in tasks}
        sources = {task: _endless(given, steps) for task, given in tasks.items()}
        if not tasks:
            raise InputError("fit: there are no batches")
        optimiser = torch.optim.Adam([self.coefficients], lr=lr, betas=betas)
        history: list[float] = []
        with self._frozen(), torch.enable_grad():
            for step in track(range(steps), "training λ"):
                optimiser.zero_grad()
                total = 0.0
                for task, source in sources.items():
                    batch = next(source)
                    value = _checked(losses[task](self._call(batch), batch), step)
                    value.backward()  # type: ignore[no-untyped-call]
                    total += float(value.detach())
                optimiser.step()
                history.append(total)
        return history

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """The model in evaluation mode, its own weights without gradient."""
        wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [(m, m.training) for m in self.model.modules()]
        try:
            self.model.eval()
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)
            for module, training in modes:
                module.training = training

    def _call(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self(**batch)
        return self(*batch) if isinstance(batch, list | tuple) else self(batch)

    def close(self) -> None:
        """Takes the adapters off the model, which is then as it was; ``λ`` and :meth:`adapter` stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def named_sources(sources: ComponentSources) -> dict[str, Adapter]:
    """The adapters by name."""
    if isinstance(sources, Pool):
        adapters = dict(zip(sources.names, sources.adapters, strict=True))
    elif isinstance(sources, Decomposition):
        adapters = sources.summands()
    elif isinstance(sources, Mapping):
        adapters = dict(sources)
    else:
        given = list(sources)
        adapters = {a.name: a for a in given}
        if len(adapters) != len(given):
            raise InputError("learned coefficients: two components have one name; give them by name, {name: adapter}")
    for name, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise InputError(f"learned coefficients: {name!r} is {adapter!r}, not a LoRA adapter")
    if not adapters:
        raise InputError("learned coefficients: no components were given")
    return adapters


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy ``−Σ_c p_c log p_c`` of ``softmax(logits [..., classes])``, in nats. A class that a logit of −inf
    masks has ``p = 0``: it adds nothing, and has no gradient."""
    logs = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    return -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1).mean()


def _endless(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """The batches, from the start again where they end."""
    source, count = iter(batches), 0
    while True:
        fresh = False
        for batch in source:
            fresh = True
            count += 1
            yield batch
        source = iter(batches)
        if not fresh:
            raise InputError(f"fit: the batches ran out after {count} of {steps} steps; give a list, or fewer steps")


def _loss_of(loss: Loss | Mapping[str, Loss] | None, task: str) -> Loss:
    if not isinstance(loss, Mapping):
        return loss or _entropy_of
    if task not in loss:
        raise InputError(f"fit: there is no loss for the batches of {task!r}; it has losses for {', '.join(loss)}")
    return loss[task]


def _entropy_of(output: Any, _: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise InputError(
            f"fit: the model returns a {type(output).__name__} without logits, so its entropy is not known; give "
            "loss=lambda output, batch: …"
        )
    return entropy(logits)


def _checked(value: Any, step: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(f"fit: the loss must be a scalar tensor, not {type(value).__name__}")
    if not bool(value.isfinite()):
        raise InputError(f"fit: the loss of step {step + 1} is {float(value.detach())}; lower lr, or check the batches")
    if not value.requires_grad:
        raise InputError(
            f"fit: the loss of step {step + 1} does not depend on the coefficients: no adapted module takes part in it"
        )
    return value.reshape(())
