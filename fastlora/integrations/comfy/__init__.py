"""ComfyUI: nodes between those that load, train, apply and save LoRAs. The pack itself is the folder ``comfy/`` of the
repository, which has nothing but this."""
