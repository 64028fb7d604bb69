"""How a single file spelled the adapter that was read from it, so that a result can be written the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastlora.errors import InputError

PEFT = "peft"
WRITTEN = (PEFT, "kohya", "diffusers", "comfy", "xlabs", "mlx")
"""Formats that low-rank adapters are written in."""
DIRECTORIES = (PEFT, "mlx")
"""Those that are a directory; the others are single files."""


def check_format(format: str) -> None:
    """Refuses a format that is not written."""
    if format not in WRITTEN:
        raise InputError(f"there is no format {format!r} to write; formats are {', '.join(WRITTEN)}")


HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""Facts of the tensors in a file of kohya's: of a result they are computed anew."""


@dataclass(frozen=True, slots=True)
class FileForm:
    """The form of a single file.

    ``format``: the module of :mod:`fastlora.formats` that read it. ``family``: of the model (``"sdxl"``, ``"flux"``),
    ``None`` where it was not needed or not certain. ``style``: the dialect within the format, by its name there.
    ``stems``: what the file calls each module, ``{module: name without the tensor's suffix}``. ``metadata``: what its
    header says, without what fastlora writes itself. ``alpha_dtype``: of the scales that it stores. ``keeps_private``:
    whether a result keeps what the metadata say of the training data.
    """

    format: str
    family: str | None = None
    style: str = ""
    stems: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    alpha_dtype: str = "float32"
    keeps_private: bool = False


def joined_form(forms: Sequence[FileForm | None]) -> FileForm | None:
    """The form of what is made of several adapters: that of the first, with the names of all that have it too, and
    the metadata in which all agree, and hashes where all have them. A family in doubt for some is that of others."""
    first = forms[0]
    if first is None:
        return None
    if all(f is first for f in forms):
        return first
    alike = [f for f in forms if f is not None and (f.format, f.style) == (first.format, first.style)]
    families = {f.family for f in forms if f is not None and f.family is not None}
    stems: dict[str, str] = {}
    for form in alike:
        for module, stem in form.stems.items():
            stems.setdefault(module, stem)
    shared = {
        k: v
        for k, v in first.metadata.items()
        if all(f is not None and (f.metadata.get(k) == v or (k in HASHES and k in f.metadata)) for f in forms)
    }
    family = first.family if first.family is not None or len(families) != 1 else families.pop()
    return replace(first, family=family, stems=stems, metadata=shared)
