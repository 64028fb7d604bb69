"""A model that PEFT adapted: its tuner, its configurations, its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from fastlora.adapters.dora import NEEDS_BASE
from fastlora.errors import InputError, UnsupportedAdapter

BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the weights of the base model, so that what an adapter adds is not all it changes."""

PACKED = ("MultiheadAttention", "LoraParallelLinear")
"""Layers of peft whose factors are not those of one module."""

OTHER_KINDS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA, which is active for a part of the input",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "layer_replication": "layer replication",
}
"""Fields of a ``LoraConfig`` that make an adapter something else than ``s·B·A`` in modules of its own."""

CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())
"""What peft keeps adapters in by name, as attributes."""

FROM_FILES = "save it (`model.save_pretrained`) and load that with `fastlora.load`, which says what can be done with it"


@dataclass(slots=True, eq=False)
class Host:
    """A model with adapters, for one call: it walks through the model once, and :meth:`forget` follows a change.

    ``model``: what the user holds. ``root``: the module from which paths count, which holds ``peft_config`` where
    there is no ``tuner``.
    """

    model: nn.Module
    root: nn.Module
    tuner: Any
    _all: list[tuple[str, Any]] | None = None
    _outer: list[tuple[str, nn.Module]] | None = None

    def forget(self) -> None:
        """Modules were added, or taken out."""
        self._all = self._outer = None

    @property
    def modules(self) -> list[tuple[str, Any]]:
        """Every module with its path."""
        if self._all is None:
            self._all = list(self.root.named_modules())
        return self._all

    @property
    def configs(self) -> dict[str, Any]:
        """The configurations of the adapters by name; empty before the first."""
        return getattr(self.tuner or self.root, "peft_config", {})

    def tuner_layers(self) -> Iterator[tuple[str, Any]]:
        """The adapted modules with their paths, those inside others left out."""
        return ((path, module) for path, module in self._modules() if isinstance(module, BaseTunerLayer))

    def module_paths(self) -> list[str]:
        """Every module of the model by path, without what adapters consist of."""
        return [path for path, _ in self._modules() if path]

    def _modules(self) -> list[tuple[str, nn.Module]]:
        if self._outer is None:
            self._outer = []
            inside = "\0"  # the adapted module that was met last: what it consists of follows
            for path, module in self.modules:
                if not path.startswith(inside):
                    self._outer.append((path, module))
                    if isinstance(module, BaseTunerLayer):
                        inside = path + "."
        return self._outer


def host_of(model: object) -> Host:
    """The parts of a model that PEFT adapted, or that it can adapt."""
    while isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # torch.compile
        model = model._modules["_orig_mod"]
    if not isinstance(model, nn.Module):
        raise InputError(f"a model is needed, a `PeftModel` or a module with adapters, not {type(model).__name__}")
    if isinstance(model, PeftMixedModel):
        raise InputError("a PeftMixedModel holds adapters of several kinds; load the LoRA adapters in a `PeftModel`")
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(tuner, BaseTuner):
        return Host(model, tuner.model, tuner)
    return Host(model, model, None)


def config_of(host: Host, name: str) -> Any:
    """The configuration of an adapter that can be computed with. Raises for one that is not there or of another
    kind."""
    configs = host.configs
    if not configs:
        raise InputError("the model has no adapters; load one, or give the adapted model itself")
    if name not in configs:
        raise InputError(f"the model has no adapter {name!r}; it has {', '.join(configs)}")
    config = configs[name]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("LORA", "IA3"):
        raise UnsupportedAdapter(
            f"adapter {name!r} is {kind}; LoRA and (IA)³ can be computed with: make a LoRA of it with peft's "
            "`convert_to_lora`"
        )
    if kind == "LORA":
        _require_plain(name, config)
    return config


def _require_plain(name: str, config: Any) -> None:
    """Refuses what is not ``s·B·A``."""
    if config.use_dora:
        raise UnsupportedAdapter(f"adapter {name!r} is a DoRA adapter: {NEEDS_BASE}")
    start = config.init_lora_weights if isinstance(config.init_lora_weights, str) else ""
    if start.lower().startswith(BASE_CHANGED):
        raise UnsupportedAdapter(
            f"adapter {name!r} was started by init_lora_weights={start!r}, which changed the base model; save it with "
            "`path_initial_model_for_weight_conversion`, load that on the base model, and take it from there"
        )
    if config.bias != "none":
        raise UnsupportedAdapter(
            f"adapter {name!r} trained biases of the model (bias={config.bias!r}), which its factors do not hold; "
            f"{FROM_FILES}"
        )
    for field, kind in OTHER_KINDS.items():
        if getattr(config, field, None):
            raise UnsupportedAdapter(f"adapter {name!r} uses {kind}, which is not s·B·A alone; {FROM_FILES}")


def lora_layers(host: Host, name: str) -> Iterator[tuple[str, Any]]:
    """The layers that a LoRA adapter has, with their paths, wrappers of parameters left out. Raises for layers that
    are not ``s·B·A``."""
    top = {id(layer) for _, layer in host.tuner_layers()}
    wrapped = {id(wrapper) for _, wrapper in parameter_wrappers(host, name)}
    for path, layer in host.modules:
        if not _has(layer, name) or id(layer) in wrapped:
            continue
        if id(layer) not in top or type(layer).__name__ in PACKED:
            raise UnsupportedAdapter(
                f"module {path!r} of adapter {name!r} is {type(layer).__name__} of peft, which holds several weights, "
                f"a share of one, or lies in another adapted module; {FROM_FILES}"
            )
        if layer.lora_variant.get(name) is not None:
            raise UnsupportedAdapter(
                f"module {path!r} of adapter {name!r} is {type(layer.lora_variant[name]).__name__}, which is not "
                f"s·B·A; {FROM_FILES}"
            )
        yield path, layer


def parameter_wrappers(host: Host, name: str) -> Iterator[tuple[str, Any]]:
    """``(path of the parameter, wrapper)`` of what a LoRA adapter has through ``target_parameters``; wrappers of one
    module lie inside each other."""
    for path, layer in host.tuner_layers():
        while type(layer).__name__ == "ParamWrapper":
            if _has(layer, name):
                yield f"{path}.{layer.parameter_name}", layer
            layer = layer.base_layer


def _has(layer: Any, name: str) -> bool:
    return isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A)


def ia3_layers(host: Host, name: str) -> Iterator[tuple[str, Any]]:
    """The layers that an (IA)³ adapter has, with their paths."""
    for path, layer in host.tuner_layers():
        if isinstance(layer, IA3Layer) and name in layer.ia3_l:
            yield path, layer


def require_new(host: Host, names: list[str]) -> None:
    """Refuses names that the model has, or that peft cannot give."""
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            raise InputError(f"{name!r} cannot be the name of an adapter in a model: it needs a text without dots")
        if any(hasattr(container, name) for container in CONTAINERS):
            raise InputError(f"{name!r} cannot be the name of an adapter: peft's containers have a method of that name")
        if name in host.configs:
            raise InputError(
                f"the model has an adapter {name!r} already; choose another name, or delete that one "
                "(`model.delete_adapter`)"
            )
