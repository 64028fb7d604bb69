"""The version, in a file of its own: formats write it, and import nothing else of the package for it."""

__version__ = "0.1.0.dev0"
