"""DoRA adapters: read, shown and kept; what they change depends on the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora import formats
from fastlora.core.data import DoraData
from fastlora.core.vector_space import VectorSpace
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.files.earlier import Overwrite

NEEDS_BASE = (
    "its magnitudes rescale the base weight, W' = m (W + ΔW) / ‖W + ΔW‖, so what it changes needs the base model: make "
    "a LoRA of it there, with `fl.to_lora(adapter, BASE)` or `--base BASE`; add DoRAs as DoRAs, with `fl.recombine` or "
    "`--dora recombine`; or write it into the model, with `fastlora apply BASE DORA --out MERGED`, and take the change "
    "with `fastlora extract BASE MERGED --rank N`"
)


class DoRA(DoraData, VectorSpace):
    """A DoRA (arXiv 2402.09353): a low-rank update and a magnitude for adapted modules of the base model.

    A module's weight becomes ``m · (W + s B A) / ‖W + s B A‖``, with one norm for each output, or for each input
    channel of files that store it so. Without the base weight ``W`` that cannot be added, merged or decomposed: the
    operators raise :class:`UnsupportedAdapter`. :func:`fastlora.load` makes adapters from files.

    Args:
        name: what messages call it.
        updates: ``{module: update}``, in the order of the file.
        magnitudes: ``{module: magnitude}``; modules without one are plain LoRA.
        extras: ``{parameter: extra}``: biases and replaced modules.
        base: what the adapter says about its base model.
        dtype: what the adapter is saved in by default.
        provenance: how the adapter came about, as plain data; it is saved with the adapter.
        notes: what a user should know, in sentences.
        details: what was measured while it was made, by name; it is not saved.
    """

    kind = "a DoRA adapter"

    def __repr__(self) -> str:
        return f"DoRA({self.name!r}, {len(self.updates)} modules, {str(self.dtype)[6:]})"

    def magnitude(self, module: str) -> Tensor:
        """``m`` of one ``module``, flat: float64 ``[out]`` or ``[in]``.

        Raises :class:`InputError` for a module that has none.
        """
        if module not in self.magnitudes:
            raise InputError(
                f"DoRA adapter {self.name!r} has no magnitude for module {module!r} (`.magnitudes` lists all "
                f"{len(self.magnitudes)})"
            )
        return self.magnitudes[module].vector.double().flatten()

    def renamed(self, strip: str, put: str) -> DoRA:
        """The adapter under module names without the prefix ``strip`` and with ``put`` before them; nothing is copied.

        A name that does not start with ``strip`` only gets ``put`` before it.
        """
        return replace(
            self,
            updates={put + m.removeprefix(strip): u for m, u in self.updates.items()},
            magnitudes={put + m.removeprefix(strip): v for m, v in self.magnitudes.items()},
            extras={put + p.removeprefix(strip): e for p, e in self.extras.items()},
        )

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        overwrite: Overwrite = False,
        format: str | None = None,
    ) -> Path:
        """Writes a PEFT directory, or the single file that it is from, atomically, magnitudes beside the factors.

        Args:
            path: the directory to make; of what was read from a single file also ``NAME.safetensors``.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; by default the widest of the inputs.
            overwrite: replace an earlier output of fastlora, known by what its files say; ``"force"`` replaces
                whatever is there.
            format: of a single file, ``"kohya"``, ``"diffusers"`` or ``"comfy"``; by default that of its own.

        Returns:
            ``path``.

        Raises:
            InputError: an unknown dtype; magnitudes of input channels, which PEFT does not have.
            OutputError: a path that exists or cannot be written, a number that overflows ``dtype``.

        Cost: one read and one write of all tensors.
        """
        return formats.save(self, Path(path), dtype=dtype, overwrite=overwrite, format=format)

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, DoRA]], name: str | None = None) -> DoRA:
        """Refuses: what a DoRA changes, and so a sum, depends on the base model.

        Args:
            terms: ``(w_i, adapter)``, one pair at the least.
            name: of the sum.

        Raises:
            UnsupportedAdapter: always, with the way out.
        """
        raise refused(terms[0][1])


def refused(element: DoRA) -> UnsupportedAdapter:
    """The error of whatever computes with a DoRA."""
    return UnsupportedAdapter(f"adapter {element.name!r} is a DoRA adapter: {NEEDS_BASE}")
