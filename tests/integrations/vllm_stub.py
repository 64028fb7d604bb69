"""What of vLLM a resolver meets, for machines without vLLM: two classes, a registry, and how the API server asks.

The server's rules: resolvers are asked in turn, and nothing guards what they raise; their number is replaced; what was
loaded is kept by its exact name for good, and read again from its path after it was put out of memory.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest


@dataclass(eq=False)
class LoRARequest:
    """vLLM's own is a struct with these fields, which has an id of at least 1 and a path."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1 or not self.lora_path:
            raise ValueError("an id of at least 1 and a path are needed")


class LoRAResolver(ABC):
    """What resolvers are derived from."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of a name, or nothing."""


class Registry:
    """Resolvers by name."""

    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def get_supported_resolvers(self) -> Any:
        return self.resolvers.keys()

    def register_resolver(self, name: str, resolver: Any) -> None:
        assert name not in self.resolvers, "vLLM warns of that"
        self.resolvers[name] = resolver

    def get_resolver(self, name: str) -> Any:
        return self.resolvers[name]


def install(patch: pytest.MonkeyPatch) -> None:
    """Lets ``import vllm.lora.resolver`` find these classes, until the test ends."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": Registry()},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        patch.setitem(__import__("sys").modules, name, module)


class Server:
    """What the API server does with the model name of a request. ``load(request)``: what workers do with its path."""

    def __init__(self, registry: Any, model: str, load: Callable[[Any], Any]) -> None:
        self.model, self.load = model, load
        self.resolvers = [registry.get_resolver(name) for name in registry.get_supported_resolvers()]
        self.known: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.problems: list[str] = []
        self.ids = 0
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def request(self, name: str) -> int:
        """The status of the answer."""
        async with self._locks[name]:
            if name == self.model or name in self.known:
                return 200
            self.ids += 1
            number, found = self.ids, False
            for resolver in self.resolvers:
                request = await resolver.resolve_lora(self.model, name)
                if request is None:
                    continue
                found = True
                request.lora_int_id = number
                try:
                    self.loaded[name] = self.load(request)
                except Exception as problem:
                    self.problems.append(f"{name}: {problem}")
                    continue
                self.known[name] = request
                return 200
            return 400 if found else 404

    def ask(self, *names: str) -> list[int]:
        """The statuses of requests that come at once."""

        async def all_of_them() -> list[int]:
            return list(await asyncio.gather(*map(self.request, names)))

        return asyncio.run(all_of_them())
