"""What a config.json would say of a GGUF file's model, from its metadata and tensors.

The keys are those of transformers' configuration classes (LlamaConfig, Qwen2Config, Gemma2Config,
..., rope_parameters as from transformers 5 on). What the metadata does not hold is as llama.cpp has
it: Gemma's pattern of sliding windows, its scale of queries. A key of the architecture that is not
known here is refused: it may change what the model computes.
"""

import math

import numpy as np

from bmft.errors import Mistake
from bmft.models import gguf_file, gguf_names

# Keys of metadata behind "llama." and the like: what is read here or in gguf_names, then what says
# nothing of the computation.
_READ = """context_length embedding_length feed_forward_length block_count attention.head_count
attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_epsilon
attention.layer_norm_rms_epsilon attention.sliding_window attention.sliding_window_pattern
attn_logit_softcapping final_logit_softcapping rope.dimension_count rope.freq_base
rope.freq_base_swa rope.scale_linear rope.scaling.type rope.scaling.factor
rope.scaling.original_context_length rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow"""
_IDLE = "vocab_size tensor_data_layout pooling_type rope.scaling.finetuned expert_used_count"
_MUST_BE = {"expert_count": 0, "attention.causal": True, "use_parallel_residual": False}

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# Of Gemma: every how many layers one sees everything; layers of the model whose queries are scaled
# by its width and not by a head's.
_PATTERN = {"gemma2": 2, "gemma3": 6}
_WIDE = {"gemma2": 46, "gemma3": 62}


def settings(path):
    """A dict as in config.json. Raises Mistake for an unknown architecture or key."""
    arch = gguf_names.architecture(path)
    _check(path, arch)
    found = _gpt2(path) if arch == "gpt2" else _llama(path, arch)
    found |= _special_tokens(gguf_file.metadata(path))
    return found | {
        "architectures": [_CLASSES[found["model_type"]]],
        "vocab_size": _tensor(path, "token_embd.weight").shape[0],
        "tie_word_embeddings": gguf_names.is_tied(path),
    }


def _check(path, arch):
    known = {*_READ.split(), *_IDLE.split()}
    for key, value in gguf_file.metadata(path).items():
        group, _, rest = key.partition(".")
        if group != arch or rest in known:
            continue
        if rest not in _MUST_BE or value != _MUST_BE[rest]:
            raise Mistake(f"{path}: {key} = {value!r} is not known, and may change the model")


def _gpt2(path):
    width = _needed(path, "embedding_length")
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": _needed(path, "block_count"),
        "n_head": _needed(path, "attention.head_count"),
        "n_positions": _needed(path, "context_length"),
        "n_inner": gguf_names.setting(path, "feed_forward_length", 4 * width),
        "layer_norm_epsilon": _needed(path, "attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _llama(path, arch):
    """What all but GPT-2 have."""
    there = gguf_file.tensors(path)
    heads = _needed(path, "attention.head_count")
    width = _needed(path, "embedding_length")
    found = {
        "model_type": {"gemma3": "gemma3_text"}.get(arch, arch),
        "hidden_size": width,
        "intermediate_size": _needed(path, "feed_forward_length"),
        "num_hidden_layers": _needed(path, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf_names.setting(path, "attention.head_count_kv", heads),
        "head_dim": _head_width(path, width // heads),
        "max_position_embeddings": _needed(path, "context_length"),
        "rms_norm_eps": _needed(path, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rotation(path),
    }
    if arch in _PATTERN:
        return found | _gemma(path, arch, found)
    found["hidden_act"] = "silu"
    if arch != "qwen2":  # it always has three biases, and no key that says so
        found["attention_bias"] = "blk.0.attn_q.bias" in there
    if arch == "llama":
        found["mlp_bias"] = "blk.0.ffn_up.bias" in there
    window = gguf_names.setting(path, "attention.sliding_window") or math.inf
    if window < found["max_position_embeddings"]:
        if arch != "llama" or found["attention_bias"] or found["mlp_bias"]:
            raise Mistake(f"{path}: sliding windows of {window} tokens are not known in {arch}")
        del found["attention_bias"], found["mlp_bias"]
        found |= {"model_type": "mistral", "sliding_window": window}
    return found


def _gemma(path, arch, found):
    depth, heads = found["num_hidden_layers"], found["num_attention_heads"]
    window = gguf_names.setting(path, "attention.sliding_window")
    wide = depth == _WIDE[arch]
    caps = (50.0, 30.0) if arch == "gemma2" else (None, None)
    more = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": found["hidden_size"] // heads if wide else found["head_dim"],
        "layer_types": _layer_types(path, arch, depth if window else 0, depth),
        "attn_logit_softcapping": gguf_names.setting(path, "attn_logit_softcapping", caps[0]),
        "final_logit_softcapping": gguf_names.setting(path, "final_logit_softcapping", caps[1]),
    }
    if window:
        more["sliding_window"] = window
    if arch == "gemma3":  # its local layers rotate by a base of their own, and are never scaled
        base = _number(gguf_names.setting(path, "rope.freq_base_swa", 10000.0))
        local = {"rope_type": "default", "rope_theta": base}
        rotations = {"sliding_attention": local, "full_attention": found["rope_parameters"]}
        more["rope_parameters"] = rotations
    return more


def _layer_types(path, arch, windowed, depth):
    """Of each layer whether it sees everything; only the first `windowed` may be sliding."""
    every = gguf_file.metadata(path).get(f"{arch}.attention.sliding_window_pattern", _PATTERN[arch])
    if isinstance(every, np.ndarray):
        sliding = every.astype(bool).tolist()
    else:
        sliding = [(i + 1) % every != 0 for i in range(depth)]
    kinds = ("full_attention", "sliding_attention")
    return [kinds[i < windowed and sliding[i]] for i in range(depth)]


def _head_width(path, default):
    """Values of a head; the rotation must take all of them."""
    width = gguf_names.setting(path, "attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = gguf_names.setting(path, key, width)
        if other != width:
            raise Mistake(f"{path}: {key} is {other}, and keys have {width}: that is not known")
    return width


def _rotation(path):
    """rope_parameters of transformers"""
    found = {"rope_type": "default", "rope_theta": _setting(path, "rope.freq_base", 10000.0)}
    kind = _setting(path, "rope.scaling.type", "none")
    factor = _setting(path, "rope.scaling.factor", _setting(path, "rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise Mistake(f"{path}: rope.scaling.type {kind!r} is not known; linear and yarn are")
    factors = gguf_file.tensors(path).get("rope_freqs.weight")
    if factors is not None:
        factors = gguf_file.values(factors, slice(None))
        if (factors != 1).any():
            return found | _llama3(path, factors, found["rope_theta"])
    if kind == "yarn":
        length = _setting(path, "rope.scaling.original_context_length")
        length = length or _needed(path, "context_length")
        found |= {"rope_type": kind, "factor": factor, "original_max_position_embeddings": length}
        for key in ("beta_fast", "beta_slow"):
            beta = _setting(path, f"rope.scaling.yarn_{key}")
            found |= {} if beta is None else {key: beta}
    elif factor != 1:
        found |= {"rope_type": "linear", "factor": factor}
    return found


def _llama3(path, factors, base):
    """Llama 3's scaling, from what it divides each frequency by: the file does not hold more.

    The slow frequencies are divided by `factor`, the fast ones by 1; between them 1 / divisor rises
    linearly with the waves in a length, from `low` of them on to `high`. (length, low, high) times
    any number is the same: low is 1, as in all of Meta's models.
    """
    waves = base ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)  # a token
    factor = float(factors.max())
    share = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() >= 2:
        slope, start = np.polyfit(waves[between], share[between], 1)
        length, high = -slope / start, 1 - 1 / start
        share_again = np.clip((length * waves - 1) / (high - 1), 0, 1)
        if np.abs(share_again - share).max() < 1e-3:
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": round(high, 2),
                "original_max_position_embeddings": round(length),
            }
    raise Mistake(f"{path}: rope_freqs.weight is not a scaling of Llama 3's kind, and not known")


def _special_tokens(about):
    """bos, eos and pad; with a token that ends a turn, eos is a list, as in config.json."""
    first, last = (1, 2) if about.get("tokenizer.ggml.model") == "llama" else (None, None)
    eos = about.get("tokenizer.ggml.eos_token_id", last)
    turns = [about.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    ends = list(dict.fromkeys(end for end in (eos, *turns) if end is not None))
    return {
        "bos_token_id": about.get("tokenizer.ggml.bos_token_id", first),
        "eos_token_id": ends if len(ends) > 1 else eos,
        "pad_token_id": about.get("tokenizer.ggml.padding_token_id"),
    }


def _setting(path, key, default=None):
    return _number(gguf_names.setting(path, key, default))


def _needed(path, key):
    """A number above zero."""
    found, key = _setting(path, key), f"{gguf_names.architecture(path)}.{key}"
    if found is None:
        raise Mistake(f"{path}: the metadata lack {key}")
    if not isinstance(found, int | float) or found <= 0:
        raise Mistake(f"{path}: {key} is {found!r}")
    return found


def _number(value):
    """A float32 of the metadata as it was written: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tensor(path, name):
    there = gguf_file.tensors(path)
    if name not in there:
        raise Mistake(f"{path}: tensor {name!r} is missing")
    return there[name]
