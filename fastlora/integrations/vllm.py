"""vLLM serves expressions: a request for the model ``0.7*legal + 0.3*med`` gets the adapter that it stands for.

vLLM asks its *resolvers* for adapters that it does not know. Ours composes them from a folder of adapters, and is
registered by the entry point ``fastlora`` of the group ``vllm.general_plugins`` where ``FASTLORA_VLLM_ADAPTERS`` is
set. docs/integrations.md has all settings.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any

from fastlora.errors import FastloraError
from fastlora.integrations.serving.settings import Settings

NAME = "fastlora"
PREFIX = "FASTLORA_VLLM_"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""

logger = logging.getLogger("fastlora.vllm")


def register() -> None:
    """Registers the resolver, where ``FASTLORA_VLLM_ADAPTERS`` names a folder. vLLM calls it in every process, maybe
    twice. What is wrong is logged, and nothing is registered then: a server starts all the same."""
    try:
        settings = Settings.read(os.environ, PREFIX, RANKS)
        if settings is None:
            return
        from vllm.lora.resolver import LoRAResolverRegistry

        if NAME not in LoRAResolverRegistry.get_supported_resolvers():
            LoRAResolverRegistry.register_resolver(NAME, make_resolver(settings))
    except FastloraError as problem:
        logger.error("expressions are not served: %s", problem)
    except Exception:
        logger.exception("expressions are not served")


def make_resolver(settings: Settings) -> Any:
    """A ``vllm.lora.resolver.LoRAResolver`` for these settings."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    from fastlora.integrations.serving.composer import Composer

    class ExpressionResolver(LoRAResolver):  # type: ignore[misc]
        """Answers names that are expressions over the adapters of a folder, and ``None`` for all others."""

        def __init__(self) -> None:
            self.composer = Composer(settings)

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """A request for the directory that was composed; never an exception."""
            path = await self.composer.answer(base_model_name, lora_name)
            if path is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=_number(lora_name), lora_path=str(path))

    return ExpressionResolver()


def _number(name: str) -> int:
    """A number for a name, at least 1. vLLM 0.32 replaces it by its own."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") % (2**31 - 1)
