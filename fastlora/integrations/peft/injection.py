"""New layers in a live model, and everything else as it was: on success and after a failure."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.functional import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastlora.errors import FastloraError, InputError
from fastlora.integrations.peft.live import Host

TUNER_LISTS = ("targeted_module_names", "targeted_parameter_names")


class Snapshot:
    """What adding adapters can change in a model: its modules, which adapters are active, what is trained, and the
    configurations. Tensors are not in it: none that is there is written to."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._children = [
            (parent, name, child) for parent in host.root.modules() for name, child in parent._modules.items()
        ]
        self._adapters = {id(m): m for m in host.root.modules() if isinstance(m, BaseTunerLayer)}
        self._names = {key: _names_in(layer) for key, layer in self._adapters.items()}
        self._states = [
            (module, {key: _copied(module.__dict__[key]) for key in ("_active_adapter", "_disable_adapters")
                      if key in module.__dict__})
            for module in host.root.modules()
        ]  # fmt: skip
        self._trained = [(p, p.requires_grad) for p in host.root.parameters()]
        self._owner: Any = host.tuner or host.root
        self._configs = dict(host.configs) if hasattr(self._owner, "peft_config") else None
        self._loaded = getattr(host.root, "_hf_peft_config_loaded", None)
        self._lists = {key: list(getattr(host.tuner, key)) for key in TUNER_LISTS if hasattr(host.tuner, key)}

    def settle(self) -> None:
        """Gives every module that was there its active adapters back, and every parameter whether it is trained."""
        for module, state in self._states:
            module.__dict__.update({key: _copied(value) for key, value in state.items()})
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)

    def undo(self) -> None:
        """Takes out whatever was added."""
        self._host.forget()
        for parent, name, child in self._children:
            if parent._modules.get(name) is not child:
                parent._modules[name] = child
        for key, layer in self._adapters.items():
            _keep_names(layer, self._names[key])
        for listed, value in self._lists.items():
            getattr(self._host.tuner, listed)[:] = value
        if self._configs is None:
            self._owner.__dict__.pop("peft_config", None)
        else:
            configs = self._owner.peft_config
            for name in [n for n in configs if n not in self._configs]:
                del configs[name]
            configs.update(self._configs)
        if self._loaded is not None:
            self._host.root.__dict__["_hf_peft_config_loaded"] = self._loaded
            if not self._loaded:
                self._host.root.__dict__.pop("_hf_peft_config_loaded")
        self.settle()


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _containers(layer: Any) -> Iterator[tuple[str, Any]]:
    for key in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        container = getattr(layer, key, None)
        if container is not None and hasattr(container, "keys"):
            yield key, container


def _names_in(layer: Any) -> dict[str, set[str]]:
    return {key: set(container.keys()) for key, container in _containers(layer)}


def _keep_names(layer: Any, names: Mapping[str, set[str]]) -> None:
    for key, container in _containers(layer):
        for name in set(container.keys()) - names[key]:
            del container[name]


@contextlib.contextmanager
def unchanged_otherwise(host: Host) -> Iterator[None]:
    """Adds to a model within the block. Active adapters and what is trained stay as they are; an error undoes all."""
    before = Snapshot(host)
    try:
        yield
    except FastloraError:
        before.undo()
        raise
    except Exception as error:
        before.undo()
        raise InputError(
            f"peft could not add the adapter to the model, which is as it was: {type(error).__name__}: {error}"
        ) from error
    except BaseException:
        before.undo()
        raise
    before.settle()


def inject(host: Host, name: str, config: Any, keys: list[str]) -> None:
    """New layers for the modules of ``keys``, names of tensors such as ``path.lora_A.weight``; without memory yet."""
    training = {path: module.training for path, module in host.modules}
    host.forget()
    state = {key: torch.empty(0) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that the fields of the configuration select beside the keys
        if host.tuner is None:
            inject_adapter_in_model(config, host.root, name, low_cpu_mem_usage=True, state_dict=state)
            if hasattr(host.root, "_hf_peft_config_loaded"):  # what transformers asks before it lists adapters
                host.root._hf_peft_config_loaded = True  # type: ignore[assignment]
        else:
            host.tuner.peft_config[name] = config
            host.tuner.inject_adapter(
                host.root, name, autocast_adapter_dtype=False, low_cpu_mem_usage=True, state_dict=state
            )
    for path in {key.rsplit(".", 2 if key.endswith(".weight") else 1)[0] for key in keys}:
        _set_training(host.root.get_submodule(path), training.get(path, False), name)


def _set_training(layer: nn.Module, training: bool, name: str) -> None:
    layer.training = training
    for path, module in layer.named_modules():
        if path.endswith(f".{name}"):
            module.training = training


def place_of(layer: Any) -> torch.device:
    """Where the weight of an adapted module is."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    first = weight if isinstance(weight, torch.Tensor) else next(base.parameters(), None)
    return torch.device("cpu") if first is None else first.device
