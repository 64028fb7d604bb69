"""Two models, parameter by parameter: what changed, what is tied, what only one of them has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fastlora.adapters.cuts import compared
from fastlora.adapters.differences import Difference
from fastlora.adapters.found_facts import found_facts
from fastlora.adapters.model_names import body_prefix, matched_names, shares_embedding, tie_group
from fastlora.adapters.selection import Selection
from fastlora.core.architectures import INPUT_EMBEDDINGS, LANGUAGE_HEADS, WEIGHT, is_buffer, is_head, is_row_table
from fastlora.core.model_facts import ModelFacts
from fastlora.errors import InputError, NonFiniteError
from fastlora.files.checkpoint import Checkpoint, stored_as
from fastlora.files.model_config import ModelConfig
from fastlora.files.quantised import quantised_error
from fastlora.files.shards import listed

OUTSIDE = re.compile(r"lm_head|cls\.|predictions\.|generator_|vocab_|score\.|classifier|qa_outputs|embed_out|proj_out")
"""What lies beside the body of a model."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a comparison found: see :class:`fastlora.core.data.DeltaData`."""

    deltas: dict[str, Difference] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=ModelFacts)
    notes: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Side:
    """One of the two models, under common names. ``names``: ``{common name: stored name}``."""

    stored: Checkpoint
    names: dict[str, str]
    tied: list[str]

    def find(self, name: str) -> str | None:
        """The stored name of a parameter, or of the one that it is tied to."""
        if name in self.names:
            return self.names[name]
        if name not in self.tied:
            return None
        return next((self.names[n] for n in self.tied if n in self.names), None)

    def tensor(self, name: str) -> Tensor:
        """As it is stored."""
        return self.stored.tensors[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return {common: tuple(self.stored.tensors[name].shape) for common, name in self.names.items()}


class Comparison:
    """Takes the change from one model to another; a fresh one for each pair."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        name: str,
        *,
        common_only: bool,
        selection: Selection,
        tied: bool | None,
        common_rows: bool = False,
    ) -> None:
        self.name = name
        self.common_only, self.common_rows = common_only, common_only or common_rows
        self.is_settled = tied is not None
        self.selection = selection
        self.skipped: set[str] = set()
        self.configs = [c.config for c in (tuned, base) if c.config is not None]
        self.notes: list[str] = [*base.notes, *tuned.notes]
        first = {n: base.tensors[n] for n in base.parameters}
        second = {n: tuned.tensors[n] for n in tuned.parameters}
        ours, theirs, rules = matched_names(first, second)
        self._tell_rules(rules, base.where)
        self._add_body_prefix(ours, theirs)
        self.group = tie_group({*ours.values(), *theirs.values()}, self.configs, tied)
        self.base = self._side(base, ours, tuned.config, tied)
        self.tuned = self._side(tuned, theirs, base.config, tied)

    def change(self) -> Change:
        """The change. Raises :class:`InputError` for what cannot be compared, :class:`NonFiniteError` for NaN."""
        names = dict.fromkeys([*self.base.names, *self.tuned.names])
        tied = [n for n in self.group if n not in names and self._pair(n) is not None]
        every = [*names, *tied]
        if not any(self._pair(n) for n in every):
            raise InputError(
                f"{self.base.stored.where} and {self.tuned.stored.where} have no parameter in common (such as "
                f"{next(iter(self.base.names), 'none')} and {next(iter(self.tuned.names), 'none')}); these are "
                "different models, or one of them is no model"
            )
        self.selection.check(every)
        shapes = self.base.shapes()
        kinds = {n: self.selection.choice(n, shapes) for n in every}
        self.skipped = {n for n in every if kinds[n] == "skip"}
        whole = [n for n in every if self.selection.keeps_whole(n) or (kinds[n] == "keep" and self._is_alike(n))]
        if any(n in self.group for n in whole):
            whole = [*dict.fromkeys([*whole, *(n for n in self.group if n in every)])]
        # A module is replaced with all of its parameters, of which one may have stayed.
        modules = {_module(n) for n in whole}
        whole += [n for n in every if n not in whole and _module(n) in modules]
        values = {n: self._value(n) for n in whole}
        wanted = [n for n in every if n not in values]
        self._refuse_codes([n for n in wanted if self._takes(n)])
        unknown = self._alone([n for n in wanted if self._takes(n)])
        wanted = [n for n in wanted if n not in unknown and self._pair(n) is not None]
        unknown += self._resized([n for n in wanted if self._takes(n)])
        deltas, excluded = self._deltas(wanted)
        if not deltas and not values:
            self.notes.append(f"task vector {self.name!r} changes nothing: the two models have equal parameters")
        ties = self._ties(deltas)
        unknown += self._unknown_head(deltas)
        facts = found_facts(deltas, self.base.shapes(), self.configs)
        self._tell_dtypes([n for n in wanted if self._takes(n)])
        changed = {_module(n) for n in values if not self._is_unchanged(n)}
        return Change(
            {n: d for n, d in deltas.items() if n not in ties},
            {n: v for n, v in values.items() if _module(n) in changed},
            replace(facts, ties=ties, unknown=tuple(unknown), excluded=excluded),
            tuple(dict.fromkeys(self.notes)),
        )

    def _takes(self, name: str) -> bool:
        return name not in self.skipped and self.selection.takes(name)

    def _is_alike(self, name: str) -> bool:
        """Whether both models have a parameter in one shape."""
        return self._pair(name) is not None and self._shapes(name)[0] == self._shapes(name)[1]

    def _add_body_prefix(self, ours: dict[str, str], theirs: dict[str, str]) -> None:
        """Names as the model has them that the configuration names, where both files lack the first part."""
        prefix = body_prefix({*ours.values(), *theirs.values()}, self.configs)
        if not prefix:
            return
        for names in (ours, theirs):
            names |= {own: n if OUTSIDE.match(n) else prefix + n for own, n in names.items()}
        architecture = next((a for c in self.configs for a in c.architectures), "the model")
        self.notes.append(
            f"task vector {self.name!r}: the files lack {prefix!r} in front of their names, which {architecture} has; "
            "the result has it"
        )

    def _side(
        self, stored: Checkpoint, renamed: Mapping[str, str], other: ModelConfig | None, tied: bool | None
    ) -> _Side:
        ties = tied if tied is not None else _ties(stored.config or other)
        return _Side(stored, {common: own for own, common in renamed.items()}, self.group if ties else [])

    def _tell_rules(self, rules: Sequence[tuple[str, str]], where: str) -> None:
        for ours, theirs in rules:
            if ours == "" or theirs == "":
                lacks = "base model" if ours == "" else "fine-tune"
                self.notes.append(
                    f"task vector {self.name!r}: the {lacks} was saved without {ours or theirs!r} in front of its "
                    "names; the result has the longer names"
                )
            else:
                self.notes.append(
                    f"task vector {self.name!r}: {theirs!r} of the fine-tune is {ours!r} of the base model {where}, "
                    "whose names the result has"
                )

    def _pair(self, name: str) -> tuple[str, str] | None:
        """The stored names of a parameter in both models."""
        old, new = self.base.find(name), self.tuned.find(name)
        return None if old is None or new is None else (old, new)

    def _value(self, name: str) -> Tensor:
        """A parameter as the fine-tune has it; what is scaled, multiplied out."""
        stored = self.tuned.find(name)
        if stored is None:
            raise InputError(f"whole: the fine-tune {self.tuned.stored.where} has no {name}; leave that pattern out")
        raw, value = self.tuned.tensor(stored), self.tuned.stored.value(stored)
        if not bool(value.isfinite().all()):
            raise not_finite(name)
        return value if value.dtype == raw.dtype and raw.dtype.itemsize > 1 else value.float()

    def _is_unchanged(self, name: str) -> bool:
        pair = self._pair(name)
        if pair is None or self.base.tensor(pair[0]).shape != self.tuned.tensor(pair[1]).shape:
            return False
        return not self._difference(pair).any()

    def _refuse_codes(self, names: Iterable[str]) -> None:
        """Refuses codes, also where the modules have other tensors than weights (``qweight``)."""
        for side in (self.base, self.tuned):
            found = [(n, side.stored.coding.refusal(side.names[n])) for n in names if n in side.names]
            coded = [(n, reason) for n, reason in found if reason is not None]
            if coded:
                raise quantised_error(side.stored.where, coded)

    def _alone(self, names: Sequence[str]) -> list[str]:
        """Parameters that only one of the models has: told, or refused."""
        alone = [n for n in names if self._pair(n) is None]
        buffers = [n for n in alone if is_buffer(n, self._any(n).shape)]
        if buffers:
            self.notes.append(
                f"task vector {self.name!r}: {listed(buffers)}, which one model stores, are no parameters"
            )
            alone = [n for n in alone if n not in buffers]
        if not alone:
            return []
        only_tuned = [n for n in alone if self.base.find(n) is None]
        only_base = [n for n in alone if self.tuned.find(n) is None]
        if not self.common_only:
            raise InputError(self._alone_message(only_base, only_tuned))
        self.notes.append(
            f"task vector {self.name!r}: only one of the models has {listed(alone)}, left out"
            + ("" if not only_tuned else "; what the fine-tune alone has can be kept whole (whole=, --whole)")
        )
        return only_tuned

    def _any(self, name: str) -> Tensor:
        """A parameter of the model that has it."""
        side = self.base if self.base.find(name) is not None else self.tuned
        return side.tensor(side.find(name) or name)

    def _alone_message(self, only_base: list[str], only_tuned: list[str]) -> str:
        sides = (("the base model", only_base), ("the fine-tune", only_tuned))
        where = ", ".join(f"{which} alone has {len(names)}" for which, names in sides if names)
        alike = self._alike(only_base, only_tuned)
        if alike is not None:
            return (
                f"only one of the two models has {listed([*only_base, *only_tuned])} ({where}), and {alike[0]} of the "
                f"base model ends as {alike[1]} of the fine-tune does; these are different models, or one has other "
                "names: rename its tensors, and pass a state dict or a file of them"
            )
        heads = [n for n in (*only_base, *only_tuned) if is_head(n.removesuffix(WEIGHT))]
        ways = []
        if heads and not self.configs:
            ways.append(f"say with tied=True (--tied) that {heads[0]} is the embedding, if it is")
        if only_tuned:
            modules = listed(list(dict.fromkeys(n.rpartition(".")[0] or n for n in only_tuned)))
            ways.append(f"keep the fine-tune's own modules whole (whole=, --whole: {modules})")
        ways.append("leave out what only one has with common_only=True (--common-only), if the result can do without")
        return (
            f"only one of the two models has {listed([*only_base, *only_tuned])}, whose change is unknown ({where}); "
            + ", or ".join(ways)
        )

    def _alike(self, only_base: list[str], only_tuned: list[str]) -> tuple[str, str] | None:
        """Two parameters, each of one model alone, that end alike and have one shape: other names for the same."""
        ends = {(n.split(".")[-2:][0], self._any(n).shape): n for n in only_base if n.endswith(WEIGHT)}
        found = ((ends.get((n.split(".")[-2:][0], self._any(n).shape)), n) for n in only_tuned if n.endswith(WEIGHT))
        return next(((a, b) for a, b in found if a is not None), None)

    def _unknown_head(self, deltas: Mapping[str, Difference]) -> list[str]:
        """The head, with a note, where an embedding changed that may be it, and nothing says whether it is."""
        if self.group or self.is_settled or any(is_head(n.removesuffix(WEIGHT)) for n in deltas):
            return []
        if any(c.ties is False or c.architectures for c in self.configs):
            return []
        modules = [n.removesuffix(WEIGHT) for n in deltas if "embeddings." not in n]  # as encoders have them
        inputs = [m for m in modules if m.rpartition(".")[2] in INPUT_EMBEDDINGS]
        if not inputs or any(is_head(n.removesuffix(WEIGHT)) for n in self.base.names):
            return []
        self.notes.append(
            f"task vector {self.name!r}: nothing says whether an output head is {inputs[0]}; where it is, say so with "
            "tied=True (--tied), or its change is not in an adapter (without one, tied=False, --no-tied)"
        )
        return ["lm_head.weight"]

    def _resized(self, names: Sequence[str]) -> list[str]:
        """Parameters of other shapes: tables whose rows were added or removed are told, others refused."""
        resized = []
        for name in names:
            old, new = self._shapes(name)
            if old == new:
                continue
            if not (is_row_table(name) and old[1:] == new[1:]):
                raise InputError(
                    f"{name} is {list(old)} in one and {list(new)} in the other; these are different models, unless it "
                    "was replaced: then keep it whole (whole=, --whole) or leave it out (exclude=, --exclude)"
                )
            resized.append(name)
        if not resized:
            return []
        old, new = self._shapes(resized[0])
        low, high = sorted((old[0], new[0]))
        rows = f"rows {low} to {high - 1}" if high - low > 1 else f"row {low}"
        happened = (
            f"{rows} were {'added' if new[0] > old[0] else 'removed'}"
            if high - low > 1
            else (f"{rows} was {'added' if new[0] > old[0] else 'removed'}")
        )
        told = f"{listed(resized)}: {old[0]} rows in the base model and {new[0]} in the fine-tune ({happened})"
        if not self.common_rows:
            ends = " ".join(
                f"--whole {n.removesuffix(WEIGHT).rpartition('.')[2]}" for n in resized if n.endswith(WEIGHT)
            )
            raise InputError(
                f"{told}; take the change of the common rows (common_only=True, --common-only), keep the fine-tune's "
                f"whole matrices (whole=, {ends}), or leave them out (exclude=, --exclude)"
            )
        self.notes.append(f"task vector {self.name!r}: {told}; the change is that of the {low} common rows")
        return [n for n in resized if self._shapes(n)[1][0] > self._shapes(n)[0][0]]

    def _shapes(self, name: str) -> tuple[torch.Size, torch.Size]:
        pair = self._pair(name)
        assert pair is not None
        return self.base.tensor(pair[0]).shape, self.tuned.tensor(pair[1]).shape

    def _deltas(self, names: Sequence[str]) -> tuple[dict[str, Difference], float]:
        """The changes that take part, and ``‖τ‖²`` of the others."""
        pairs = {name: pair for name in names if (pair := self._pair(name)) is not None}
        tensors = {n: (self.base.tensor(old), self.tuned.tensor(new)) for n, (old, new) in pairs.items()}
        changed = compared(tensors, lambda n: self._changed(pairs[n]) if self._takes(n) else self._size(pairs[n]))
        floating = [n for n in names if all(t.is_floating_point() for t in tensors[n])]
        deltas = {n: self._difference(pairs[n]) for n in floating if self._takes(n) and changed[n]}
        counted = [n for n in names if n not in floating and self._takes(n) and changed[n]]
        sizes = {n: changed[n] for n in floating if not self._takes(n)}
        excluded, left_out = sum(sizes.values()), [n for n, size in sizes.items() if size]
        if counted:
            self.notes.append(f"task vector {self.name!r}: {listed(counted)} differ and are no parameters, left out")
        if left_out:
            self.notes.append(f"task vector {self.name!r}: {listed(left_out)} changed and are left out, as asked for")
        return deltas, excluded

    def _changed(self, pair: tuple[str, str]) -> bool:
        old, new = self.base.tensor(pair[0]), self.tuned.tensor(pair[1])
        if old.is_floating_point() and new.is_floating_point():
            return self._difference(pair).any()
        return not torch.equal(old, new)

    def _difference(self, pair: tuple[str, str]) -> Difference:
        old, new = self.base.stored, self.tuned.stored
        is_wide = torch.float64 in (old.tensors[pair[0]].dtype, new.tensors[pair[1]].dtype)
        return Difference(partial(old.value, pair[0]), partial(new.value, pair[1]), is_wide)

    def _size(self, pair: tuple[str, str]) -> float:
        """``‖Δ‖²`` of a parameter that is left out; 0 where it cannot be told, or is no parameter."""
        if not all(t.is_floating_point() for t in (self.base.tensor(pair[0]), self.tuned.tensor(pair[1]))):
            return 0.0
        if any(side.stored.coding.refusal(n) for side, n in zip((self.base, self.tuned), pair, strict=True)):
            return 0.0
        same = self.base.tensor(pair[0]).shape == self.tuned.tensor(pair[1]).shape
        return self._difference(pair).square() if same else 0.0

    def _ties(self, deltas: Mapping[str, Difference]) -> dict[str, str]:
        """Changed parameters that a model does not store, which are others that change in the same way."""
        stored = [n for n in self.group if n in deltas and n in self.base.names]
        source = next(iter(stored), None)
        if source is None:
            return {}
        others = [n for n in self.group if n in deltas and n not in self.base.names]
        return {n: source for n in others if deltas[n].equals(deltas[source])}

    def _tell_dtypes(self, names: Sequence[str]) -> None:
        """Notes where one model is coarser than the other: its rounding counts as change."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in names:
            pair = self._pair(name)
            assert pair is not None
            old, new = self.base.tensor(pair[0]), self.tuned.tensor(pair[1])
            if old.dtype != new.dtype and old.is_floating_point() and new.is_floating_point():
                found.setdefault((stored_as(old), stored_as(new)), []).append(name)
        for (old_dtype, new_dtype), members in found.items():
            self.notes.append(
                f"task vector {self.name!r}: {listed(members)} are {old_dtype} in the base model and {new_dtype} in "
                "the fine-tune; the rounding of the coarser counts as change"
            )


def _ties(config: ModelConfig | None) -> bool:
    """Whether a model whose head is not stored has the embedding as its head."""
    if config is None:
        return False
    if shares_embedding(config):
        return True
    if config.ties is None:
        return any(LANGUAGE_HEADS.fullmatch(a) for a in config.architectures)
    return config.ties


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def not_finite(name: str) -> NonFiniteError:
    return NonFiniteError(
        f"{name} holds NaN or Inf in the base model or in the fine-tune, so its change would mean nothing; save the "
        "models again"
    )
