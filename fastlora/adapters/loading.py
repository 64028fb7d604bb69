"""From a path to an adapter of one of the kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastlora import formats
from fastlora.adapters.dora import DoRA
from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.renaming import Renaming
from fastlora.adapters.task_vector import TaskVector
from fastlora.core.data import AdapterData, DeltaData, DoraData, Ia3Data, LoraData
from fastlora.runtime.cpython import paused_collector

Element = Adapter | DoRA | IA3 | TaskVector
"""Whatever can be loaded, added and scaled."""

KINDS: dict[type[AdapterData], type[Element]] = {
    LoraData: Adapter,
    DoraData: DoRA,
    Ia3Data: IA3,
    DeltaData: TaskVector,
}
"""What a record that a format read becomes: the same fields, with verbs."""


def load(
    path: str | Path,
    name: str | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    family: str | None = None,
    rank: int | None = None,
) -> Element:
    """Loads one adapter: LoRA, DoRA, (IA)³ or a saved task vector. The format is detected from the files.

    Args:
        path: a PEFT directory; a single file of an image or video model (kohya, diffusers, ComfyUI, XLabs, LyCORIS;
            ``.safetensors``, ``.pt``, ``.bin``, ``.ckpt``) or a folder that holds one; a folder of MLX; the Hub id of
            one of these (``org/name``, ``org/name@revision``, ``org/name@revision/folder``,
            ``org/name/file.safetensors``); or the file of a task vector. A Hub id needs ``huggingface_hub``: it is
            looked up in the local cache first, and downloaded if it is not there.
        name: what the adapter is called from here on. By default it is the name of the folder or file.
        rename: ``{old: new}``: modules called ``old`` or ``old.…`` become ``new`` or ``new.…``, by whole segments.
        family: the models that a single file is for (``"sdxl"``, ``"flux"``), where its names fit several. Other
            formats have no use for it.
        rank: the rank at which modules of a single file are read that are no plain LoRA (LoHa, LoKr, whole matrices).
            The nearest update of that rank is taken, and the notes say how near it is. By default they are read
            exactly, up to rank 256.

    Returns:
        :class:`Adapter`, :class:`DoRA`, :class:`IA3` or :class:`TaskVector`, on the CPU and in the dtype of the file.

    Raises:
        InputError: a path, file, field or tensor that cannot be used; a ``rename`` that nothing has a use for.
        UnsupportedAdapter: a kind whose numbers would come out wrong, a file of a model that is not known, or one that
            lacks its configuration. Both errors say what was found and what to do.

    Cost: one read of the configuration and of the file's header. Tensors of ``.safetensors`` files stay in the file,
    memory-mapped, until a result needs them. A task vector is read once, to refuse NaN and Inf.
    """
    if rename is None and (known := formats.read_alike(path, name)) is not None:
        return element_of(known)  # of a few objects, until somebody looks at it
    with paused_collector():
        renaming = Renaming(rename)
        element = renaming(element_of(formats.read(path, name, family=family, rank=rank)))
        renaming.require_used()
        return element


def element_of(record: AdapterData) -> Element:
    """What a record becomes: the same fields, with verbs."""
    element = object.__new__(KINDS[type(record)])
    element.__dict__.update(record.__dict__)  # asking for each field would make what nobody has looked at yet
    return element
