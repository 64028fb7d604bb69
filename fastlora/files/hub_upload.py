"""Results for the Hub: what would be uploaded, what must not be, and the upload."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.core.card import LOCAL_PATH, CardFacts, card_text, figures_of
from fastlora.core.names import CARD_NAME, CONFIG_NAME
from fastlora.errors import InputError, OutputError
from fastlora.files.earlier import MARK
from fastlora.files.json_files import parse_object
from fastlora.files.tensor_files import SAFETENSORS, read_header

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BASE = "base_model_name_or_path"


@dataclass(frozen=True, slots=True)
class Upload:
    """A folder, or one file, that is to become the repository ``repo``. ``files``: ``{path there: path here}``.
    ``card``: the text of the card, where no file has it."""

    repo: str
    files: Mapping[str, Path]
    card: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values()) + len((self.card or "").encode())

    @property
    def names(self) -> list[str]:
        """What the repository will hold."""
        return [*self.files, *([] if self.card is None else [CARD_NAME])]


def check_repository(repo: str) -> None:
    """Refuses what is no name of a repository."""
    if not REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".ipynb")):
        raise InputError(f"{repo!r} is no name of a repository; give one as org/name")


def require_client() -> Any:
    """The Hub's client with a login. Raises :class:`InputError` without either."""
    try:
        import huggingface_hub
    except ImportError:
        raise InputError("pushing needs the Hub's client: pip install 'fastlora[hub]'") from None
    if huggingface_hub.get_token() is None:
        raise InputError("pushing needs a login to the Hub: `hf auth login`, or the variable HF_TOKEN")
    return huggingface_hub.HfApi()


def upload_of(out: Path, repo: str) -> Upload:
    """What would be uploaded of an output: the files of a folder, or one file and a card of it.

    Raises :class:`InputError` where it names paths of this machine, which mean nothing to others and tell of the owner.
    """
    if out.is_dir():
        found = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
    else:
        found = {out.name: out}
    upload = Upload(repo, found, _card_of(out) if out.suffix == SAFETENSORS else None)
    for name, what in _local_paths(upload):
        raise InputError(
            f"{name} names {what!r}, a path of this machine; nothing was pushed, and {out} stays. Give Hub ids "
            f"for base models ({BASE} of the adapters), or upload it as it is: `hf upload {repo} {out}`"
        )
    return upload


def send(api: Any, upload: Upload, *, public: bool, replace: bool) -> str:
    """Uploads, in one commit, and returns the address. A repository that is not there is made, private unless
    ``public``.

    Raises :class:`OutputError` where files would be replaced without ``replace``, and for whatever the Hub refuses.
    """
    try:
        url = str(api.create_repo(upload.repo, private=not public, exist_ok=True))
        there = set() if replace else {*api.list_repo_files(upload.repo)} & {*upload.names}
    except Exception as error:  # the client has many kinds of errors: network, rights, names
        raise _refused(upload, error) from None
    if there:
        raise OutputError(
            f"{upload.repo} holds {sorted(there)[0]} already; push to another name, or replace it with --overwrite"
        )
    try:
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
        if upload.card is not None:
            operations.append(CommitOperationAdd(CARD_NAME, upload.card.encode()))
        api.create_commit(upload.repo, operations, commit_message="Upload with fastlora")
    except Exception as error:
        raise _refused(upload, error) from None
    return url


def _card_of(file: Path) -> str:
    """The card of one file, by what its header says of how it was made."""
    try:
        made = json.loads(read_header(file).metadata.get(MARK, "{}"))
    except ValueError:
        made = {}
    provenance = made.get("provenance") if isinstance(made, dict) else None
    told: Mapping[str, object] = provenance if isinstance(provenance, dict) else {}
    return card_text(CardFacts(file.stem, "LoRA", "diffusers", ["lora"], [], "adapter", told, figures_of(told)))


def _refused(upload: Upload, error: Exception) -> OutputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    folder = next(iter(upload.files.values())).parent
    return OutputError(
        f"the result is written, and was not pushed to {upload.repo}: {reason}; try `hf upload {upload.repo} {folder}`"
    )


def _local_paths(upload: Upload) -> Iterator[tuple[str, str]]:
    for name, path in upload.files.items():
        if path.name == CARD_NAME:
            match = LOCAL_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
            if match is not None:
                yield name, match[0]
        elif path.name == CONFIG_NAME:
            base = parse_object(path.read_bytes(), str(path)).get(BASE)
            if isinstance(base, str) and base and (LOCAL_PATH.match(base) or Path(base).exists()):
                yield name, base
        elif path.suffix == SAFETENSORS:
            match = LOCAL_PATH.search(json.dumps(read_header(path).metadata.get(MARK, "")).replace("\\\\", "\\"))
            if match is not None:
                yield name, match[0]
