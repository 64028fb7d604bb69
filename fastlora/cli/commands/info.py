"""``fastlora info``."""

from __future__ import annotations

from fastlora.cli.options import Json
from fastlora.cli.run import print_json


def info(as_json: Json = False) -> None:
    """Versions, backends, and why each is or is not usable."""
    from fastlora.views.environment import environment, show_environment

    data = environment()
    if as_json:
        print_json(data)
    else:
        show_environment(data)
