"""Adapters in a live model that PEFT adapted: read, merged, decomposed and written in place, without files.

A model is a ``PeftModel``, its tuner, or any module that adapters were injected into, as transformers' and diffusers'
``load_adapter`` do: a module with a ``peft_config``. Factors are read where they are, on any device, without a copy.
Functions that change a model compute first. When they raise, the model is as it was.
"""

from fastlora.runtime import packages

packages.require("peft")

from fastlora.integrations.peft.combining import add_weighted_adapter  # noqa: E402
from fastlora.integrations.peft.installing import install, uninstall  # noqa: E402
from fastlora.integrations.peft.parts import decompose_adapters  # noqa: E402
from fastlora.integrations.peft.reading import pool, read  # noqa: E402
from fastlora.integrations.peft.swapping import swap  # noqa: E402
from fastlora.integrations.peft.writing import write  # noqa: E402

__all__ = ["add_weighted_adapter", "decompose_adapters", "install", "pool", "read", "swap", "uninstall", "write"]
