"""What a module of an image or video model is called here: its path in the diffusers model."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]
"""Rows and columns of a weight; of a convolution ``(out, in · kernel)``."""


@dataclass(frozen=True, slots=True)
class Named:
    """A module that a file names.

    ``component``: ``""`` for the denoiser, else ``text_encoder``, ``transformer_2``, … ``path``: the module's path in
    the diffusers model of that component; of a projection that the file has fused, the path that diffusers gives it.
    ``original``: the file spells it as the original code of the model does. ``swapped``: the two halves of its rows
    stand in the other order in the file.
    """

    component: str
    path: str
    original: bool = False
    swapped: bool = False

    @property
    def module(self) -> str:
        """The name of the module in an adapter."""
        return f"{self.component}.{self.path}" if self.component else self.path
