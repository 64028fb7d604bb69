"""What is known of a model beside the change of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What two models said about the parameters whose change was taken, beside the change itself.

    ``configured``: whether a configuration names the architecture. ``in_out``: modules whose weight is ``[in, out]``.
    ``assumed``: modules whose weight was taken for ``[out, in]`` without evidence. ``ties {parameter: parameter}``: the
    first is the second, and changes with it. ``in_out_experts``: fused experts are ``[experts, in, out]``.
    ``by_parameter``: modules that PEFT adapts by their parameter. ``unsuited``: those that it does not
    adapt. ``fused_later``: experts lie one by one and have to be adapted in one tensor. ``task_type``: as PEFT calls
    it. ``unknown``: parameters that changed in a way that is not known. ``excluded``: ``‖τ‖²`` of those that were left
    out on demand. ``still {module: shape}``: those that do not take part.
    """

    configured: bool = False
    in_out: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    in_out_experts: bool = False
    by_parameter: tuple[str, ...] = ()
    unsuited: tuple[str, ...] = ()
    fused_later: bool = False
    task_type: str | None = None
    unknown: tuple[str, ...] = ()
    excluded: float = 0.0
    still: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def renamed(self, name: Callable[[str], str]) -> ModelFacts:
        """The same of parameters and modules under other names."""

        def of_module(module: str) -> str:
            return name(f"{module}.weight").removesuffix(".weight")

        return replace(
            self,
            in_out=tuple(map(of_module, self.in_out)),
            assumed=tuple(map(of_module, self.assumed)),
            ties={name(p): name(source) for p, source in self.ties.items()},
            by_parameter=tuple(map(of_module, self.by_parameter)),
            unsuited=tuple(map(of_module, self.unsuited)),
            unknown=tuple(map(name, self.unknown)),
            still={of_module(m): shape for m, shape in self.still.items()},
        )
