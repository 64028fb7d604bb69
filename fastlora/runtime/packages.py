"""The packages that integrations need: which are there, and of which version. None of them is imported here."""

from __future__ import annotations

import re
from importlib import metadata
from typing import NamedTuple

from fastlora.errors import PackageError


class Needed(NamedTuple):
    """A package that an integration needs: its name, the least version, and the extra that installs it, if one does."""

    package: str
    least: str
    extra: str


INTEGRATIONS: dict[str, tuple[Needed, ...]] = {
    "peft": (Needed("peft", "0.21", "peft"),),
    "transformers": (Needed("transformers", "5.0", "peft"), Needed("peft", "0.21", "peft")),
    "diffusers": (Needed("diffusers", "0.42", "diffusers"), Needed("peft", "0.21", "diffusers")),
    "vllm": (Needed("vllm", "0.32", "vllm"),),
    "sglang": (Needed("sglang", "0.5", ""),),
}
"""What each module of ``fastlora.integrations`` needs."""


def missing(integration: str) -> str | None:
    """Why an integration cannot be used, with the way out, or ``None`` where it can."""
    for package, least, extra in INTEGRATIONS[integration]:
        there = version(package)
        if there is None:
            wanted = f"'fastlora[{extra}]'" if extra else package
            return f"{package} is not installed: `pip install {wanted}`"
        if _numbers(there) < _numbers(least):
            return f"{package} {there} is installed, and {least} or newer is needed: `pip install -U {package}`"
    return None


def state(integration: str) -> str:
    """``"usable"`` with the versions that are there, or the reason why an integration is not."""
    there = ", ".join(f"{needed.package} {version(needed.package)}" for needed in INTEGRATIONS[integration])
    return missing(integration) or f"usable with {there}"


def require(integration: str) -> None:
    """Raises :class:`PackageError` where an integration cannot be used."""
    reason = missing(integration)
    if reason is not None:
        raise PackageError(f"fastlora.integrations.{integration} cannot be used: {reason}")


def version(package: str) -> str | None:
    """The installed version of a package, or ``None``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``(0, 21)`` of ``"0.21.2.dev0"``: as far as versions are compared here."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
