"""``fastlora info``."""

from __future__ import annotations

from fastlora.cli.options import command
from fastlora.cli.run import Run, print_json


@command("as_json")
def info(run: Run) -> None:
    """Versions, backends, and why each is or is not usable."""
    from fastlora.views.environment import environment, show_environment

    data = environment()
    if run.as_json:
        print_json(data)
    else:
        show_environment(data)
