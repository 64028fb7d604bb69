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
    ``parameter_routers``: modules that PEFT adapts by their parameter. ``task_type``: as PEFT calls it. ``unknown``:
    parameters that changed in a way that is not known. ``excluded``: ``‖τ‖²`` of those that were left out on demand.
    ``still {module: shape}``: experts that did not change, beside others that did.
    """

    configured: bool = False
    in_out: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    in_out_experts: bool = False
    parameter_routers: tuple[str, ...] = ()
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
            parameter_routers=tuple(map(name, self.parameter_routers)),
            unknown=tuple(map(name, self.unknown)),
            still={of_module(m): shape for m, shape in self.still.items()},
        )
