"""What the header of a single file says: the facts of its inputs that still hold, and facts of the file itself."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from fastlora._version import __version__
from fastlora.core.data import LoraData
from fastlora.core.file_form import FileForm
from fastlora.files.earlier import MARK

DESCRIPTION = "lora_adapter_metadata"
"""Where diffusers looks for the configurations of PEFT of all components."""

STALE = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", DESCRIPTION, MARK, "format"})
PRIVATE = frozenset("ss_dataset_dirs ss_reg_dataset_dirs ss_tag_frequency ss_bucket_info ss_datasets ot_config".split())
"""What may say of a training run what its owner would not tell: folders, captions."""

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
HASHES: Mapping[str, int] = {MODEL_HASH: 64, LEGACY_HASH: 8}
"""What kohya's scripts call hashes of the tensors, and how many digits each has."""

LEGACY_SPAN = 0x100000, 0x110000
CHUNK = 1 << 22


def facts(
    adapter: LoraData, form: FileForm | None, ranks: Sequence[int], alphas: Sequence[float], *, is_kohya: bool
) -> dict[str, str]:
    """The metadata of a result: those in which its inputs agree, and what is true of the result.

    ``ranks``, ``alphas``: of all modules. Private facts of the training are left out unless ``form`` keeps them.
    """
    given = {} if form is None else form.metadata
    private = PRIVATE if form is None or not form.keeps_private else frozenset[str]()
    kept = {key: value for key, value in given.items() if key not in STALE and key not in private}
    own = _network(ranks, alphas) if is_kohya or "ss_network_dim" in kept else {}
    kept.pop("ss_network_args", None)  # of training: dimensions of convolutions, dropout
    if "ss_output_name" in kept:
        own["ss_output_name"] = adapter.name
    if any(key.startswith("modelspec.") for key in kept):
        own |= {"modelspec.title": adapter.name, "modelspec.date": _now()}
        if not is_kohya and form is not None and "modelspec.implementation" in kept and form.format == "kohya":
            own["modelspec.implementation"] = "diffusers"
    provenance = json.dumps({"version": __version__, "provenance": adapter.provenance}, default=str)
    return {**kept, **own, "format": "pt", MARK: provenance}


def _network(ranks: Sequence[int], alphas: Sequence[float]) -> dict[str, str]:
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _only(ranks),
        "ss_network_alpha": _only(alphas or [float(r) for r in ranks]),
    }


def _only(numbers: Sequence[float]) -> str:
    found = set(numbers)
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"


def _now() -> str:
    """The time in UTC; ``SOURCE_DATE_EPOCH`` stands for it where it is set."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(int(seconds) if seconds.isdigit() else None))


def description(ranks_by_component: Mapping[str, Mapping[str, int]], with_bias: Collection[str] = ()) -> str:
    """``lora_adapter_metadata`` under which every module has the scale 1, whatever reads it.

    ``{component: {module of diffusers: rank}}``. ``with_bias``: components with a ``lora_B.bias``. Modules are given as
    patterns that match one path; those of text encoders by the end of it, since transformers has them below
    ``text_model`` or not.
    """
    config: dict[str, object] = {}
    for component, given in ranks_by_component.items():
        is_text = component.startswith("text_encoder")
        ranks = {m.removeprefix("text_model.") if is_text else m: rank for m, rank in given.items()}
        most = max(ranks.values())
        smaller = {m if is_text else f"^{m}": rank for m, rank in ranks.items() if rank != most}
        fields: dict[str, object] = {
            "r": most,
            "lora_alpha": most,
            "rank_pattern": smaller,
            "alpha_pattern": smaller,
            "target_modules": list(ranks),
            "use_rslora": False,
            "use_dora": False,
            "lora_bias": component in with_bias,
            "bias": "none",
        }
        config |= {f"{component}.{key}": value for key, value in fields.items()}
    return json.dumps(config)


def hashes(path: Path, start: int, entries: Mapping[str, object], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes of kohya's scripts: of the tensors alone, and of 64 KiB of a file that would hold ``ss_`` facts only.

    ``start``: where the tensors begin in the file. ``entries``: the header's, without metadata.
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = json.dumps({"__metadata__": kept, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    prefix = len(header).to_bytes(8, "little") + header
    first, last = LEGACY_SPAN
    whole, legacy = hashlib.sha256(), hashlib.sha256(prefix[first:last])
    at = len(prefix)
    for chunk in _chunks(path, start):
        whole.update(chunk)
        if at < last and at + len(chunk) > first:
            legacy.update(chunk[max(0, first - at) : last - at])
        at += len(chunk)
    return {MODEL_HASH: whole.hexdigest(), LEGACY_HASH: legacy.hexdigest()[: HASHES[LEGACY_HASH]]}


def _chunks(path: Path, start: int) -> Iterator[memoryview]:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]
