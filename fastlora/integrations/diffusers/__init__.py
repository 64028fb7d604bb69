"""The LoRAs that are loaded in a pipeline of diffusers: merged, mixed, compared and saved in place.

A pipeline has components with adapters (``unet``, ``transformer``, ``text_encoder``, …). Functions that change it
compute all components first. When they raise, the pipeline is as it was.
"""

from fastlora.runtime import packages

packages.require("diffusers")

from fastlora.integrations.diffusers.merging import merge_loaded, mix_unique  # noqa: E402
from fastlora.integrations.diffusers.reading import overlap  # noqa: E402
from fastlora.integrations.diffusers.saving import save_merged  # noqa: E402

__all__ = ["merge_loaded", "mix_unique", "overlap", "save_merged"]
