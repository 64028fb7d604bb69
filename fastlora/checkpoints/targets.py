"""Where the updates of an adapter go: from a module's name to rows of stored tensors.

Names are taken as they are, without or with a component of a pipeline, or aligned with the base model's
(:mod:`fastlora.adapters.alignment`). A weight that is fused on one side and in parts on the other gets its rows, which
is exact. A module without a tensor is an error by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from fastlora.adapters.alignment import align
from fastlora.adapters.expert_forms import INTERLEAVED, NUMBERED, PARTS
from fastlora.adapters.fused_projections import FUSED, FUSED_OF, part_rows
from fastlora.checkpoints.base import Base, matrix_shape, module_of
from fastlora.core.architectures import LOOKS_LIKE_CONV1D, TRANSPOSED_EXPERTS, WEIGHT, is_conv1d
from fastlora.core.experts import DOWN, GATE_UP
from fastlora.core.updates import Layout, Update
from fastlora.errors import InputError
from fastlora.files.tensor_files import StoredTensor

NEAREST = 3  # names in a message


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows of an update go: ``ΔW[rows]`` is added to the matrix of ``tensor``, from row ``at`` and column
    ``left`` on; ``turned``: ``ΔW[rows]ᵀ`` is, since the weight is stored as ``[in, out]``."""

    tensor: str
    rows: tuple[int, int]
    at: int = 0
    left: int = 0
    turned: bool = False


class Targets:
    """Finds the stored tensors of adapters' modules in one base model."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.modules = {module_of(name): name for name in base.tensors}
        self.ties = base.ties()
        self._tied = {module_of(n): group for group in self.ties for n in group}
        self._experts = _numbered(self.modules)
        self._turned = {name: _is_turned(base, name) for name in base.tensors}

    # -- names ----------------------------------------------------------------------------------------------------

    def names(self, label: str, wanted: Mapping[str, Hashable]) -> dict[str, str]:
        """``{name: name in the base model}``, of modules and parameters with what must agree (:func:`signature_of`).

        Raises :class:`InputError` for names that the base model does not have.
        """
        best: dict[str, str] = {}
        for attempt in self._attempts(label, wanted):
            if all(self.knows(new) for new in attempt.values()):
                return attempt
            if not best or self._count(attempt) > self._count(best):
                best = attempt
        missing = {old: new for old, new in best.items() if not self.knows(new)}
        old, new = next(iter(missing.items()))
        refusal = self.base.refusal(new + WEIGHT) or self.base.refusal(new)
        if refusal is not None:
            raise quantised(self.base, new, refusal)
        near = difflib.get_close_matches(new, self.modules, NEAREST, 0.0)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"adapter {label!r} changes {old}{more}, which {self.base.root} does not have; the nearest names there are "
            f"{', '.join(near)}. Pass the model that the adapter is of, or give its names with --map OLD=NEW (rename=)"
        )

    def _count(self, attempt: Mapping[str, str]) -> int:
        return sum(self.knows(new) for new in attempt.values())

    def _attempts(self, label: str, wanted: Mapping[str, Hashable]) -> Iterable[dict[str, str]]:
        yield {name: name for name in wanted}
        components = [c for c in self.base.components if c]
        firsts = {name.partition(".")[0] for name in wanted}
        if not components and len(firsts) == 1:
            yield {name: name.partition(".")[2] for name in wanted}
        for component in components:
            yield {name: f"{component}.{name}" for name in wanted}
        own = {m: signature_of(self.base.tensors[n]) for m, n in self.modules.items()}
        found = align([str(self.base.root), label], [own, wanted]).names
        back = {new: old for old, new in found[0].items()}
        aligned = {name: found[1].get(name, name) for name in wanted}
        aligned = {name: back.get(new, new) for name, new in aligned.items()}
        yield aligned
        rules = {_rule(old, new) for old, new in aligned.items() if self.knows(new)}
        if len(rules) == 1:  # what has no counterpart to be aligned with, moves with the others
            ((start, instead),) = rules
            yield {name: instead + name.removeprefix(start) if name.startswith(start) else name for name in wanted}

    def knows(self, name: str) -> bool:
        """Whether a module or parameter has a place in the base model."""
        return (
            name in self.modules
            or name in self.base.tensors
            or name in self._tied
            or bool(self._fused_of(name))
            or bool(self._parts_of(name))
            or bool(self._expert_places(name))
        )

    # -- places ---------------------------------------------------------------------------------------------------

    def places(self, label: str, module: str, update: Update, shapes: Mapping[str, tuple[int, int]]) -> list[Place]:
        """The places of an update of a module under its name in the base model.

        ``shapes``: of all modules of the adapter, ``(out, in)`` by name in the base model, which tell how wide the
        parts of a fused weight are. Raises :class:`InputError` for shapes that do not fit.
        """
        layout, (n, m) = update.layout, update.shape
        if layout.kind == "expert":
            return self._of_expert(label, module, update)
        name = self.stored(module)
        if name is None:
            places = self._of_fused(module, shapes) or self._of_parts(module, n) or self._of_one_expert(module, n)
            for place in places:
                self._check(label, module, (n, m), place)
            if not places:
                raise _unfit(label, module, (n, m), None, self.base)
            return places
        refusal = self.base.refusal(name)
        if refusal is not None:
            raise quantised(self.base, name, refusal)
        tensor = self.base.tensors[name]
        turned = layout.kind == "embedding" or self._turned[name]
        if layout.kind == "conv" and len(tensor.shape) > 2 and layout.kernel != tensor.shape[2:]:
            raise _unfit(label, module, (n, m), tensor, self.base)
        rows, columns = matrix_shape(tensor)
        if (rows, columns) != ((m, n) if turned else (n, m)):
            turned = not turned
            if (rows, columns) != ((m, n) if turned else (n, m)) or not _may_turn(module, layout, tensor):
                raise _unfit(label, module, (n, m), tensor, self.base)
        return [Place(name, (0, n), turned=turned)]

    def stored(self, module: str) -> str | None:
        """The tensor of a module or parameter, or of the one that it is tied to."""
        name = self.modules.get(module, module if module in self.base.tensors else None)
        if name is None and module in self._tied:
            name = next(n for n in self._tied[module] if n in self.base.tensors)
        return name

    def is_turned(self, tensor: str) -> bool:
        """Whether a weight is stored as ``[in, out]``."""
        return self._turned[tensor]

    def _check(self, label: str, module: str, shape: tuple[int, int], place: Place) -> None:
        refusal = self.base.refusal(place.tensor)
        if refusal is not None:
            raise quantised(self.base, place.tensor, refusal)
        tensor = self.base.tensors[place.tensor]
        rows, columns = matrix_shape(tensor)
        if len(tensor.shape) == 3:
            rows, columns = tensor.shape[0] * tensor.shape[1], tensor.shape[2]
        height, width = place.rows[1] - place.rows[0], shape[1]
        if place.turned:
            height, width = width, height
        fits = place.at + height <= rows and place.left + width <= columns and (place.left or width == columns)
        if not fits and not (place.turned and place.left + width <= columns):
            raise _unfit(label, module, shape, tensor, self.base)

    def _fused_of(self, module: str) -> str | None:
        parent, _, end = module.rpartition(".")
        names = (f"{parent}.{f}" if parent else f for f in FUSED_OF.get(end, ()))
        return next((name for name in names if name in self.modules), None)

    def _of_fused(self, module: str, shapes: Mapping[str, tuple[int, int]]) -> list[Place]:
        """Rows of a fused weight, for one of its parts."""
        fused = self._fused_of(module)
        if fused is None:
            return []
        parent, _, end = module.rpartition(".")
        tensor = self.modules[fused]
        total = self.base.tensors[tensor].shape[0]
        parts = {p: f"{parent}.{p}" if parent else p for p in FUSED[fused.rpartition(".")[2]]}
        lengths = {p: shapes[name][0] for p, name in parts.items() if name in shapes}
        config = self.base.config_of(tensor)
        starts = part_rows(fused, {**_said_widths(config.values if config else {}, lengths), **lengths}, total)
        if starts is None or end not in starts:
            return []
        start, stop = starts[end]
        return [Place(tensor, (0, stop - start), at=start)] if stop - start == shapes[module][0] else []

    def _parts_of(self, module: str) -> dict[str, str]:
        parent, _, end = module.rpartition(".")
        names = {part: f"{parent}.{part}" if parent else part for part in FUSED.get(end, ())}
        found = {part: self.modules[name] for part, name in names.items() if name in self.modules}
        return found if len(found) == len(names) else {}

    def _of_parts(self, module: str, n: int) -> list[Place]:
        """A tensor for each part, for a fused weight."""
        parts = self._parts_of(module)
        lengths = {part: self.base.tensors[name].shape[0] for part, name in parts.items()}
        starts = part_rows(module, lengths, n) if parts else None
        return [] if starts is None else [Place(parts[part], starts[part]) for part in parts]

    # -- experts --------------------------------------------------------------------------------------------------

    def _expert_places(self, name: str) -> object:
        """Whether experts are there under another name: one by one for a fused parameter, or the other way round."""
        owner, _, last = name.rpartition(".")
        numbered = NUMBERED.fullmatch(name)
        if numbered is not None and numbered[3] in PARTS:
            return self._fused_experts(numbered[1], PARTS[numbered[3]])
        return self._experts.get(_layer(owner)) if last in (GATE_UP, DOWN) and "experts" in owner else None

    def _fused_experts(self, owner: str, part: str) -> str | None:
        """The parameter of all experts of the same layer that has a part in it."""
        last = DOWN if part == DOWN else GATE_UP
        if f"{owner}.{last}" in self.base.tensors:
            return f"{owner}.{last}"
        layer = _layer(owner)
        ends = (n for n in self.base.tensors if n.endswith(f"experts.{last}") and _layer(n) == layer)
        return next(ends, None)

    def _of_expert(self, label: str, container: str, update: Update) -> list[Place]:
        """Rows of a parameter that holds all experts, for one of them; a parameter of a module's own is one expert."""
        layout, (n, m) = update.layout, update.shape
        name = self.modules.get(container, container if container in self.base.tensors else None)
        if name is None:
            return self._of_experts_one_by_one(label, container, update)
        refusal = self.base.refusal(name)
        if refusal is not None:
            raise quantised(self.base, name, refusal)
        tensor = self.base.tensors[name]
        shape = tensor.shape if len(tensor.shape) == 3 else (1, *tensor.shape)
        if len(shape) != 3 or shape[0] != layout.experts or {shape[1:], shape[:0:-1]}.isdisjoint({(n, m)}):
            raise _unfit(label, container, (n, m), tensor, self.base)
        turned = shape[1:] != (n, m)
        if layout.order == "older":
            turned = True  # of [experts, in, out], for which that version of PEFT took every parameter
        elif n == m and layout.order == "unsaid":
            raise InputError(
                f"adapter {label!r} does not say by which version of PEFT it was saved, and {container} is square "
                f"{list(tensor.shape)}: whether its experts lie transposed cannot be known; write the version into its "
                'adapter_config.json, such as "peft_version": "0.18.0"'
            )
        elif n == m:
            turned = self._turned[name]
        if (m, n) != shape[1:] and turned:
            raise _unfit(label, container, (n, m), tensor, self.base)
        return [Place(name, (0, n), at=layout.expert * shape[1], turned=turned)]

    def _of_experts_one_by_one(self, label: str, container: str, update: Update) -> list[Place]:
        """Tensors of single experts, for an update of the parameter of all (``gate_up_proj = [gate; up]``)."""
        owner, _, last = container.rpartition(".")
        experts = self._experts.get(_layer(owner), {})
        parts = experts.get(update.layout.expert, {})
        n, m = update.shape
        wanted = [DOWN] if last == DOWN else ["gate", "up"]
        if last not in (GATE_UP, DOWN) or len(experts) != update.layout.experts or not parts.keys() >= set(wanted):
            raise _unfit(label, f"{container} of {update.layout.experts} experts", (n, m), None, self.base)
        places, start = [], 0
        for part in wanted:
            name = self.modules[parts[part]]
            tensor = self.base.tensors[name]
            stop = start + tensor.shape[0]
            places.append(Place(name, (start, stop)))
            if tensor.shape[1] != m:
                raise _unfit(label, container, (n, m), tensor, self.base)
            start = stop
        if start != n:
            raise _unfit(label, container, (n, m), self.base.tensors[places[0].tensor], self.base)
        return places

    def _of_one_expert(self, module: str, n: int) -> list[Place]:
        """Rows, or columns, of the parameter of all experts, for a layer of one."""
        numbered = NUMBERED.fullmatch(module)
        if numbered is None or numbered[3] not in PARTS:
            return []
        part, expert = PARTS[numbered[3]], int(numbered[2])
        name = self._fused_experts(numbered[1], part)
        if name is None or len(self.base.tensors[name].shape) != 3:
            return []
        config = self.base.config_of(name)
        if config is not None and any(INTERLEAVED.search(t) for t in config.model_types) and part in ("gate", "up"):
            return []
        _, first, _ = self.base.tensors[name].shape
        turned = self._turned[name]
        start = n if part == "up" else 0
        if expert >= self.base.tensors[name].shape[0]:
            return []
        if turned:
            return [Place(name, (0, n), at=expert * first, left=start, turned=True)]
        return [Place(name, (0, n), at=expert * first + start)]


def signature_of(tensor: StoredTensor) -> Hashable:
    """What a module's tensor has in common with an update of it: its lengths in any order."""
    return lengths(matrix_shape(tensor)) if len(tensor.shape) != 3 else (tensor.shape[0], lengths(tensor.shape[1:]))


def lengths(shape: Iterable[int]) -> tuple[int, ...]:
    """Lengths in order of size."""
    return tuple(sorted(shape))


def quantised(base: Base, name: str, how: str) -> InputError:
    """The refusal of a base model that is stored as codes."""
    return InputError(
        f"{base.root} is quantised ({how}): {name} holds codes, to which nothing can be added. Merge the adapters into "
        "one (`fastlora merge … --out DIR`) and load that beside the quantised model, or apply them to the model in "
        "bfloat16"
    )


def _unfit(label: str, module: str, shape: tuple[int, int], tensor: StoredTensor | None, base: Base) -> InputError:
    there = "has no weight of that form" if tensor is None else f"has {tensor.name} {list(tensor.shape)}"
    return InputError(
        f"adapter {label!r} changes {module} by {list(shape)}, and {base.root} {there}; the adapter is of another base "
        "model, or of another version of its code"
    )


def _may_turn(module: str, layout: Layout, tensor: StoredTensor) -> bool:
    """Whether a weight may be stored as ``[in, out]`` although nothing says so, or ``[out, in]`` although its name
    does: matrices, by their shape."""
    return layout.kind in ("linear", "embedding") and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]


def _is_turned(base: Base, name: str) -> bool:
    """Whether a weight is ``[in, out]``: of the class ``Conv1D``, or experts of some models."""
    tensor = base.tensors[name]
    if len(tensor.shape) not in (2, 3):
        return False
    config = base.config_of(name)
    types = config.model_types if config is not None else ()
    if len(tensor.shape) == 3:
        return any(t in TRANSPOSED_EXPERTS for t in types)
    module = module_of(name)
    if types:
        return any(is_conv1d(module, t) for t in types)
    return LOOKS_LIKE_CONV1D.fullmatch(module) is not None and _has_wide_fused(base, name)


def _has_wide_fused(base: Base, name: str) -> bool:
    """Whether the fused projections of a model without a configuration are ``[in, 3·in]``."""
    fused = (t.shape for n, t in base.tensors.items() if n.endswith(".c_attn.weight") and len(t.shape) == 2)
    return any(shape[1] > shape[0] for shape in fused)


def _numbered(modules: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """``{layer: {expert: {part: module}}}`` of experts that are stored one by one."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for module in modules:
        numbered = NUMBERED.fullmatch(module) if "experts." in module else None
        if numbered is not None and numbered[3] in PARTS:
            layer = found.setdefault(_layer(numbered[1]), {})
            layer.setdefault(int(numbered[2]), {})[PARTS[numbered[3]]] = module
    return found


def _layer(path: str) -> str:
    """The layer that experts lie in, to its number: ``model.layers.0``."""
    parts = path.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: number + 1])


def _rule(old: str, new: str) -> tuple[str, str]:
    """What two names begin with, before what they have in common."""
    one, two = old.split("."), new.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return ".".join([*one, ""]) if one else "", ".".join([*two, ""]) if two else ""


def _said_widths(values: Mapping[str, object], known: Mapping[str, int]) -> dict[str, int]:
    """The widths of queries, keys and values by a configuration, where an adapter has not all of them."""
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    hidden, size = values.get("hidden_size"), values.get("head_dim")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return {}
    size = size if isinstance(size, int) and size > 0 else hidden // heads
    groups = groups if isinstance(groups, int) and groups > 0 else heads
    widths = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
    return widths if not {"gate_proj", "up_proj"} & known.keys() else {}
