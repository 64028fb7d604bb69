"""Adapters of the Hub: ``org/name``, a revision ``org/name@v2``, and what lies in it: ``org/name@v2/folder``,
``org/name/file.safetensors``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w][\w.-]*)*)(?:@(.+))?")
PART = re.compile(r"[\w][\w.+-]*")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model*"
SINGLE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""What diffusers calls the one file of an adapter."""
OF_MLX = "adapters.safetensors"
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""What names of single files end with."""
BESIDE = ("non_lora_trainables.bin", "value_head.*", "new_embeddings.safetensors", "trainable_params.bin")
"""Small files of trained parameters, which are fetched so that they can be told."""


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A folder in a revision of a repository, by default the root of the default branch; or a file."""

    repo: str
    revision: str | None = None
    folder: str = ""

    @property
    def is_file(self) -> bool:
        """Whether ``folder`` is the path of a file."""
        return self.folder.endswith(FILES)

    @property
    def name(self) -> str:
        """What an adapter from there is called by default."""
        return (self.folder or self.repo).rpartition("/")[2]


def places(text: str) -> list[HubPlace]:
    """What a text can mean, the likeliest first: names of branches may hold slashes. None for what is no Hub id."""
    match = HUB_ID.fullmatch(text)
    if match is None:
        return []
    repo, folder, after = match[1], match[2].removeprefix("/"), match[3]
    if after is None:
        return [HubPlace(repo, None, folder)]
    parts = after.split("/")
    if not all(PART.fullmatch(part) for part in parts):
        return []
    if folder:  # org/name/folder@revision
        return [HubPlace(repo, after, folder)]
    first = 3 if parts[0] == "refs" and len(parts) >= 3 else 1  # refs/pr/1
    return [HubPlace(repo, "/".join(parts[:i]), "/".join(parts[i:])) for i in range(first, len(parts) + 1)]


def cached(place: HubPlace) -> Path | None:
    """The folder in the local cache, if it is there and holds an adapter, or several in folders of their own."""
    try:
        snapshot = _snapshot(place, local=True)
    except ImportError:
        raise
    except Exception:  # the client has many kinds of errors; in the cache all of them mean "not there"
        return None
    folder = snapshot / place.folder
    if place.is_file:
        return folder if folder.is_file() else None
    whole = any(folder.glob(CONFIG)) and (any(folder.glob(WEIGHTS)) or any(folder.glob(OF_MLX)))
    single = any((folder / name).is_file() for name in SINGLE)
    return folder if whole or single or any(folder.glob(f"*/{CONFIG}")) else None


def fetched(text: str, candidates: list[HubPlace]) -> tuple[HubPlace, Path]:
    """The folder from the local cache, or else from the Hub.

    Raises :class:`InputError` where it is in neither, or the Hub's client is not installed.
    """
    try:
        for place in candidates:
            folder = cached(place)
            if folder is not None:
                return place, folder
    except ImportError:
        raise InputError(
            f"{text} is neither a path nor can it be looked up in the Hub or its local cache; correct the path, or "
            "to take it from the Hub: pip install 'fastlora[hub]'"
        ) from None
    reason = ""
    for place in candidates:
        try:
            folder = _snapshot(place, local=False) / place.folder
        except Exception as error:  # network, permissions, names, revisions: all of them mean the same here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if folder.is_dir() and not place.is_file:
            return _the_only_file(place, folder)
        if folder.is_file():
            return place, folder
        what = "file" if place.is_file else "folder with an adapter,"
        reason = f"{place.repo} has no {what} {place.folder}"
    raise InputError(f"{text} is no path here and could not be fetched from the Hub: {reason[:300]}")


def _the_only_file(place: HubPlace, folder: Path) -> tuple[HubPlace, Path]:
    """A folder that was fetched; where nothing in it has a usual name, its only file of tensors. Raises
    :class:`InputError` where there are several."""
    if any(folder.iterdir()):
        return place, folder
    try:
        from huggingface_hub import list_repo_files

        names = list_repo_files(place.repo, revision=place.revision)
    except Exception:  # the folder tells what it lacks
        return place, folder
    start = f"{place.folder}/" if place.folder else ""
    files = [n for n in names if n.startswith(start) and "/" not in n[len(start) :] and n.endswith(FILES[0])]
    if len(files) > 1:
        raise InputError(
            f"{place.repo} holds {len(files)} files of tensors ({', '.join(files[:4])}, …) under names of their own; "
            f"give one of them: {place.repo}/{files[0]}"
        )
    if not files:
        return place, folder
    only = HubPlace(place.repo, place.revision, files[0])
    return only, _snapshot(only, local=False) / only.folder


def _snapshot(place: HubPlace, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    start = f"{place.folder}/" if place.folder else ""
    files = [start + name for name in (CONFIG, WEIGHTS, OF_MLX, *SINGLE, *BESIDE)]
    if place.is_file:
        files = [place.folder]
    if place.revision is None:
        return Path(snapshot_download(place.repo, allow_patterns=files, local_files_only=local))
    return Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=files, local_files_only=local))
