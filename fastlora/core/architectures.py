"""What the architectures of transformers store in an unusual way, told by names and shapes: weights that lie as
``[in, out]``, embeddings, heads that are tied to them, experts in one tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

WEIGHT, BIAS = ".weight", ".bias"

CONV1D: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "gpt2": r"(attn|crossattention)\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj)",
        "imagegpt": r"(attn|crossattention)\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj)",
        "decision_transformer": r"(attn|crossattention)\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj)",
        "openai-gpt": r"attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj)",
        "clvp": r"conditioning_encoder\..*mlp\.(c_fc|c_proj)|decoder\..*mlp\.(c_fc|c_proj)",
        "clvp_decoder": r"mlp\.(c_fc|c_proj)",
    }.items()
}
"""Modules of the class ``Conv1D``, by the model type: ends of their paths. Their weight is ``[in, out]``."""

LOOKS_LIKE_CONV1D = re.compile(r"(.*\.)?(c_attn|q_attn|c_fc|c_proj)")
"""Names that modules of that class have, and also some others (GPTBigCode, StarCoder)."""

HEADS = frozenset("lm_head embed_out proj_out output_projection generator_lm_head vocab_projector lm_loss".split())
"""Last names of heads that give a logit for each row of an embedding."""
HEAD_ENDS = ("lm_head.decoder", "predictions.decoder", "lm_head.out_proj")

NO_EMBEDDING = re.compile(r".*(proj|project|projection|mapping|linear|dense|norm|out|conv)(_\w+)?")
EMBEDDING = re.compile(
    r"(\w+_)?(embed|embedding|embeddings|embeds)(_\w+)?|wte|wpe|shared|embed_in|relative_attention_bias"
)
"""Last names of modules of the class ``Embedding``, whose weight is ``[rows, dim]``."""

OFFSET_EMBEDDING = re.compile(r"(.*\.)?embed_positions")
"""Embeddings of a class of their own, which get something else than row numbers: PEFT looks up the wrong rows."""

DEPTHWISE = re.compile(r"(.*\.)?(conv1d|depthwise\w*|dw_?conv\w*|\w*_dwconv|pos_conv_embed\.conv)")
"""Convolutions of every channel by itself, whose weight looks like one of a single channel."""

EXPERT_NUMBER = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
"""A module of one expert: its container, its number, what it is."""
FUSED_NAMES = frozenset("gate_up_proj down_proj gate_proj up_proj w1 w2 w3 v1 wi wo".split())
EXPERT_MODULES = frozenset("input_linear output_linear".split())
TRANSPOSED_EXPERTS = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
"""Model types whose fused experts PEFT takes for ``[experts, in, out]``; ``[experts, out, in]`` elsewhere."""
EXPERT_NAMES = {
    "w1 w2 w3": "mixtral minimax minimax_m2",
    "gate_proj up_proj down_proj": "Dots3NoteTextModel afmoe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe "
    "glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe longcat_flash solar_open mellum qwen3_moe beam qwen3_omni_moe "
    "qwen3_omni_moe_thinker qwen3_omni_moe_text qwen3_next hunyuan_v1_moe flex_olmo olmoe sarvam_mla exaone_moe "
    "cohere2_moe",
}
TRANSLATED = {t: frozenset(names.split()) for names, types in EXPERT_NAMES.items() for t in types.split()}
"""Names of the weights of experts that PEFT translates for newer model code, by model type, with the router ``gate``.
It takes every module of such a name for an expert's, so others must be adapted by their parameter."""
FUSED_SINCE = frozenset(("qwen2_moe",))
"""Model types whose experts lie one by one in files and in one tensor in newer model code, which PEFT does not
translate."""
ROUTERS = frozenset(("router", "gate"))
"""Modules that choose experts. Their classes are often their own, so PEFT adapts them by their parameter."""
NO_MODULES = {
    model_type: frozenset(("out_proj", "conv1d"))
    for model_type in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
}
"""Modules that PEFT refuses to adapt, by model type."""

OWN_HEADS = {
    "lm_head.decoder": "roberta xlm-roberta xlm-roberta-xl camembert roberta-prelayernorm data2vec-text longformer "
    "mpnet ibert esm xmod",
    "cls.predictions.decoder": "bert ernie roc_bert roformer mobilebert fnet visual_bert tapas yoso nystromformer mra "
    "megatron-bert layoutlm lxmert big_bird deberta nomic_bert",
    "predictions.decoder": "albert",
    "generator_lm_head": "electra convbert",
    "vocab_projector": "distilbert",
    "decoder": "modernbert",
    "proj_out": "whisper moonshine",
    "output_projection": "biogpt",
    "embed_out": "gpt_neox gpt_neox_japanese",
    "head": "rwkv",
    "lm_loss": "xlnet",
    "pred_layer.proj": "xlm flaubert",
}
HEAD_BY_TYPE = {model_type: head for head, types in OWN_HEADS.items() for model_type in types.split()}
"""The head that is tied to the embedding where it is not called ``lm_head``."""

OWN_EMBEDDINGS = {
    "transformer.wte": "gpt2 gpt_neo gptj gpt_bigcode codegen mpt imagegpt",
    "transformer.word_embeddings": "bloom falcon",
    "transformer.tokens_embed": "openai-gpt",
    "gpt_neox.embed_in": "gpt_neox gpt_neox_japanese",
    "backbone.embeddings": "mamba mamba2 falcon_mamba",
    "shared": "t5 mt5 umt5 longt5 switch_transformers udop",
    "model.shared": "bart mbart pegasus blenderbot blenderbot-small marian m2m_100 mvp plbart bigbird_pegasus",
    "model.decoder.embed_tokens": "opt whisper",
    "bert.embeddings.word_embeddings": "bert",
    "roberta.embeddings.word_embeddings": "roberta xlm-roberta camembert",
    "distilbert.embeddings.word_embeddings": "distilbert",
    "electra.embeddings.word_embeddings": "electra",
    "albert.embeddings.word_embeddings": "albert",
    "model.embeddings.tok_embeddings": "modernbert",
}
EMBEDDING_BY_TYPE = {model_type: path for path, types in OWN_EMBEDDINGS.items() for model_type in types.split()}
"""The embedding of a model type, where a file holds its head alone; ``model.embed_tokens`` of all others."""

INPUT_EMBEDDINGS = frozenset(
    "embed_tokens wte word_embeddings tok_embeddings tokens_embed embed_in shared embeddings word_embedding".split()
)
TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)
"""Ends of the names of classes, and what PEFT calls their task."""
BUFFERS = re.compile(
    r"(.*\.)?((cross)?attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|"
    r"position_ids|relative_position_index|final_logits_bias)"
)
"""Tables that some versions of transformers store and others compute."""
LANGUAGE_HEADS = re.compile(
    r".*(EncoderDecoderModel|LMHead\w*|WithLMHead\w*|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining)"
)


def is_head(module: str) -> bool:
    """Whether a module is an output head of a language model, by its path."""
    return module.rpartition(".")[2] in HEADS or module.endswith(HEAD_ENDS) or module == "head"


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding, by its path."""
    last = module.rpartition(".")[2]
    if is_head(module):
        return False
    return EMBEDDING.fullmatch(last) is not None and NO_EMBEDDING.fullmatch(last) is None


def is_buffer(parameter: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a table that is computed and not learned: a mask ``[1, 1, n, n]`` is no bias."""
    learned = len(shape) == 1 and parameter.endswith((".attn.bias", ".crossattn.bias", ".attention.bias"))
    return BUFFERS.fullmatch(parameter) is not None and not learned


def is_row_table(parameter: str) -> bool:
    """Whether the rows of a parameter belong to tokens or positions, so that rows can be added at its end."""
    module = parameter.removesuffix(WEIGHT).removesuffix(BIAS)
    return parameter.endswith((WEIGHT, BIAS)) and (is_head(module) or is_embedding(module))


def is_conv1d(module: str, model_type: str | None) -> bool:
    """Whether a module of a known model type is of the class ``Conv1D``."""
    pattern = CONV1D.get(model_type or "")
    return pattern is not None and re.search(rf"(^|\.)({pattern.pattern})$", module) is not None


def task_type(architectures: Collection[str], text_pair: bool) -> str | None:
    """What PEFT calls the task of a model of these classes, from text to text where ``text_pair``; ``None`` where that
    is unknown, or where PEFT's own class for the task could not be called with what the model takes."""
    for name in architectures:
        task = next((task for end, task in TASKS if name.endswith(end)), None)
        if task is None and text_pair and name.endswith("ForConditionalGeneration"):
            task = "SEQ_2_SEQ_LM"
        if task is not None:
            return task
    return None
