"""SGLang serves expressions, as far as its hooks go. **Untested with SGLang itself**: written after SGLang 0.5.23, and
tested on a stand-in for the few objects that it meets.

SGLang has no resolvers. Its tokenizer manager looks up every adapter of a request in ``lora_ref_cache``, and loads from
there what is not loaded. The hook puts a composed directory in there first. It is registered by the entry point
``fastlora`` of the group ``sglang.srt.plugins`` where ``FASTLORA_SGLANG_ADAPTERS`` is set.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from fastlora.errors import FastloraError
from fastlora.integrations.serving.settings import Settings

PREFIX = "FASTLORA_SGLANG_"
TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._resolve_lora_path"

logger = logging.getLogger("fastlora.sglang")


def register() -> None:
    """Registers the hook, where ``FASTLORA_SGLANG_ADAPTERS`` names a folder. What is wrong is logged, and nothing is
    registered then."""
    try:
        settings = Settings.read(os.environ, PREFIX)
        if settings is None:
            return
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(TARGET, make_hook(settings), HookType.AROUND)
    except FastloraError as problem:
        logger.error("expressions are not served: %s", problem)
    except Exception:
        logger.exception("expressions are not served")


def make_hook(settings: Settings) -> Any:
    """What is called around ``TokenizerManager._resolve_lora_path(request)``. Adapters are written with one rank for
    all modules, which SGLang needs."""
    from sglang.srt.lora.lora_registry import LoRARef

    from fastlora.integrations.serving.composer import Composer

    composer = Composer(settings, uniform_rank=True)

    async def resolve(original: Any, manager: Any, request: Any) -> Any:
        """Composes the expressions among the adapters of a request, then looks them up as before."""
        asked = request.lora_path
        for name in dict.fromkeys([asked] if isinstance(asked, str) else asked or ()):
            if name is None or name in manager.lora_ref_cache:
                continue
            path = await composer.answer(manager.server_args.model_path, name)
            if path is not None:
                manager.lora_ref_cache[name] = LoRARef(lora_name=name, lora_path=str(path), pinned=False)
        return await original(manager, request)

    return resolve
