"""Versions, devices and backends, as data and as text."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from fastlora._version import __version__
from fastlora.views.tables import Table


def environment() -> dict[str, Any]:
    """Versions, and each backend and integration with ``"usable"`` or the reason why it is not."""
    import torch

    from fastlora.backends import cpu
    from fastlora.ops.dispatch import ORDER, current_backend
    from fastlora.runtime import devices, packages

    backends = {name: _state(name) for name in ORDER}
    data: dict[str, Any] = {
        "fastlora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": current_backend(),
        "backends": backends,
        "devices": devices.describe(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "integrations": {name: packages.state(name) for name in packages.INTEGRATIONS},
    }
    for package in ("numpy", "safetensors", "lark", "peft", "triton", "matplotlib", "huggingface_hub"):
        try:
            data[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            data[package] = "not installed"
    if cpu.unavailable() is None:
        try:
            data["instruction set"] = cpu.isa()
        except RuntimeError as error:  # FASTLORA_ISA names what does not exist or does not run here
            data["instruction set"] = backends["cpu"] = str(error)
        data["CUDA build"] = cpu.cuda_build()
    return data


def _state(backend: str) -> str:
    """``"usable"`` and for which ops, or the reason why a backend is not."""
    from fastlora.ops.dispatch import RULES, kernels

    ops = kernels(backend)
    if isinstance(ops, str):
        return ops
    wanted = [op for op in RULES if not op.endswith("_pass")]
    usable = [op for op in wanted if op in ops]
    return "usable" if usable == wanted else f"usable: {', '.join(usable)}"


def show_environment(data: dict[str, Any]) -> None:
    """Prints what :func:`environment` found."""
    table = Table("name:", "text:")
    for key, value in data.items():
        if key == "backends":
            for name, state in value.items():
                table.add(f"backend {name}", state)
        elif key == "integrations":
            for name, state in value.items():
                table.add(f"integration {name}", state)
        elif key == "devices":
            for state in value:
                table.add("device", state)
        else:
            table.add(key, value)
    table.print()
