"""fastlora's nodes for ComfyUI: put this folder into ``custom_nodes``, as ``custom_nodes/fastlora``."""


async def comfy_entrypoint():
    """What ComfyUI calls when it starts."""
    from fastlora.integrations.comfy.nodes import FastloraExtension

    return FastloraExtension()
