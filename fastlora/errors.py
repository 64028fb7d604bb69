"""The errors a user can cause. Their message is the whole story: what, where, what was found, what to do."""

from __future__ import annotations


class FastloraError(Exception):
    """Wrong use or bad input. The command line prints the message alone and exits with 2."""


class InputError(FastloraError, ValueError):
    """A file, tensor, name or argument that cannot be used as it is."""


class NonFiniteError(InputError):
    """A factor that holds NaN or Inf."""


class UnsupportedAdapter(InputError):
    """An adapter of a kind whose numbers fastlora would get wrong, refused by name."""


class OutputError(FastloraError, OSError):
    """The result could not be written; nothing that loads was left behind."""
