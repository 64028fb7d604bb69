"""The errors a user can cause. Their message is the whole story: what, where, what was found, what to do."""

from __future__ import annotations


class FastloraError(Exception):
    """Wrong use or bad input. The command line prints the message alone and exits with 2."""

    def __str__(self) -> str:
        # Names and fields come from files: what they hold must not steer a terminal or break a log.
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(FastloraError, ValueError):
    """A file, tensor, name or argument that cannot be used as it is."""


class NonFiniteError(InputError):
    """A factor that holds NaN or Inf."""


class UnsupportedAdapter(InputError):
    """An adapter of a kind whose numbers fastlora would get wrong, refused by name."""


class PackageError(FastloraError, ImportError):
    """A package that an integration needs is missing, or of a version that it cannot use."""


class OutputError(FastloraError, OSError):
    """The result could not be written; nothing that loads was left behind."""


class BackendError(FastloraError, RuntimeError):
    """No backend takes a call; the message has a line for each, with its reason."""

    def __str__(self) -> str:
        return RuntimeError.__str__(self)  # our own words, and several lines of them


class DeviceMemoryError(FastloraError, MemoryError):
    """The memory of a device does not suffice."""
