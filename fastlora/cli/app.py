"""The command line: its commands, its version, its entry point. Imports nothing heavy until a command runs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from typing import Annotated

import typer

from fastlora._version import __version__
from fastlora.cli.commands import (
    apply,
    bench,
    check,
    compose,
    compress,
    convert,
    decompose,
    extract,
    info,
    inspect,
    merge,
    methods,
    modulate,
    overlap,
    report,
)
from fastlora.cli.exits import guarded, listen, open_streams
from fastlora.cli.ranks import quiet

app = typer.Typer(
    name="fastlora",
    help="Merge, decompose and edit pools of LoRA adapters, exactly and without dense matrices.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)


COMMANDS = (
    decompose.decompose,
    merge.merge,
    methods.methods,
    compress.compress,
    convert.convert,
    inspect.inspect,
    check.check,
    overlap.overlap,
    report.report,
    bench.bench,
    info.info,
    modulate.modulate,
    compose.compose,
    extract.extract,
    apply.apply,
)
"""In the order of help."""

for command in COMMANDS:
    app.command(cls=compose.Command if command is compose.compose else None)(command)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"fastlora {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _end() -> None:
    """Spares the search for garbage among all objects of torch with which Python ends, a third of a second. Triton's
    bindings would take what is not found for a leak, and say so."""
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """Entry point: 0 done, 1 internal error or what a check found, 2 wrong use or bad input (one message), 128 + n
    stopped by signal n."""
    atexit.register(_end)
    open_streams()
    quiet()
    listen()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # σ and ‖ where the encoding has none
    sys.exit(guarded(lambda: app(standalone_mode=False)))


def entry() -> None:
    """The console script: :func:`main`, and the end of the process without taking the objects of torch apart one by
    one, a tenth of a second. What was registered for the end is done before."""
    try:
        main()
    except SystemExit as end:
        watched = sys.gettrace() or sys.getprofile()  # by who has something to say afterwards
        if isinstance(end.code, int) and threading.active_count() == 1 and not watched:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise
