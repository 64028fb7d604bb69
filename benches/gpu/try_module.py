"""``python -m benches.gpu.try_module``: whether the compiled module can be imported and finds a device; without torch,
whose first import may take long."""

from __future__ import annotations

import sys

from fastlora import _core


def main() -> str | None:
    """What is wrong, or ``None``."""
    if not _core.has_cuda:
        return "it has no CUDA kernels"
    count, why = _core.cuda_device_count()
    return None if count else f"no device: {why}"


if __name__ == "__main__":
    sys.exit(main())
