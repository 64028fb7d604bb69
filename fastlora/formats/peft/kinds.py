"""Adapters of PEFT that are no plain ``s·B·A``: what they are, and the way out that PEFT has for each."""

from __future__ import annotations

MERGE_FIRST = (
    "load it with peft on its base model, merge it (`merge_and_unload`), save that model, and take the change with "
    "`fastlora extract BASE MERGED --rank N`"
)
NO_WAY = "peft cannot merge it either, and it is no change of the weights that a LoRA adapter could hold: leave it out"

PROMPTS = "it puts trained vectors before the input, or into attention"
UNMERGEABLE = {
    "ADAPTION_PROMPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "CPT": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "LILY": "its modules share experts, which a router mixes for every token",
    "POLY": "it mixes adapters for every task",
    "SHADOW": "it runs a small network beside the model",
    "XLORA": "it mixes LoRA adapters for every token",
}
"""PEFT types that have no merged form."""

VARIANTS = {
    "alora_invocation_tokens": (
        "an aLoRA adapter: it acts on the tokens after its invocation sequence only, so it is no change of the weights",
        NO_WAY,
    ),
    "use_qalora": (
        "a QALoRA adapter: its lora_A acts on pooled inputs, so its change is not s·B·A",
        "peft cannot merge it; leave it out, or train a plain LoRA adapter",
    ),
    "kasa_config": (
        "a KaSA adapter: it belongs to a truncated base model and has a diagonal between its factors",
        MERGE_FIRST,
    ),
    "use_bdlora": (
        "a BD-LoRA adapter: its factors are block-diagonal and stored in a packed form",
        MERGE_FIRST,
    ),
    "arrow_config": (
        "an Arrow router: it mixes other adapters per token and is no change of the weights",
        "load the LoRA adapters that it mixes, each from its own directory",
    ),
    "trainable_token_indices": (
        (
            "an adapter with trained token embeddings (trainable_token_indices): they replace rows of the base "
            "model's embedding, whose change is unknown without the base model"
        ),
        MERGE_FIRST,
    ),
}
"""Fields that, when set, make an adapter something else than ``s·B·A`` added to a weight; what, and the way out."""


def way_out_of(kind: str) -> str:
    """What to do with an adapter of a PEFT type that is neither LoRA nor (IA)³."""
    if kind == "XLORA":
        return f"{UNMERGEABLE[kind]}, and has no merged form: load those adapters, which its field 'adapters' names"
    if kind in UNMERGEABLE:
        return f"{UNMERGEABLE[kind]}; {NO_WAY}"
    return f"make a LoRA adapter of it with `peft.save_as_lora` where peft supports that, or {MERGE_FIRST}"
