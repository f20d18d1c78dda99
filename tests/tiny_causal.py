"""Tiny causal language models in Hugging Face directories, and batches for them.

As in tests/tiny.py, dimensions are unlike one another: 6 heads of 8 numbers on a width of 36, two
heads of keys and values; windows shorter than the texts; and every part matters.
"""

import json

import numpy as np
from safetensors.numpy import save_file

from bmft import models, names, tree
from bmft.models import weights

VOCABULARY, LENGTHS = 53, (19, 3, 8, 14)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_inner": 40,
    "n_positions": 64,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# {name: config.json}; `rope_theta` and `rope_scaling` as files of before transformers 5 have them.
CONFIGS = {
    "llama": SIZES
    | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3}
    | {"tie_word_embeddings": True},
    # With fields of other families here and there: transformers passes them over.
    "llama_biases": SIZES
    | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}}
    | {"attention_bias": True, "mlp_bias": True, "final_logit_softcapping": 1.0},
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 5, "attention_bias": True},
    "qwen2": {key: size for key, size in SIZES.items() if key != "head_dim"}
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
    | {"max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": SIZES
    | {"model_type": "qwen3", "rope_theta": 1000.0, "rope_scaling": YARN, "attention_bias": True}
    | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "gemma": SIZES | {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
    "gemma2": SIZES
    | {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 5}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": SIZES
    | {"model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 7}
    | {"rope_local_base_freq": 50.0, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 4.0},
    "gpt2": GPT2,
    "gpt2_untied": GPT2
    | {"scale_attn_by_inverse_layer_idx": True, "n_inner": None, "tie_word_embeddings": False}
    | {"scale_attn_weights": False},
}


def directory(folder, name="llama", seed=0, **changes):
    """A model directory with random weights of a size that makes every part matter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    model = models.find(str(folder))
    rng, shapes, tensors = np.random.default_rng(seed), tree.flatten(weights.shapes(model)), {}
    one = 1 - getattr(model.config, "norm_offset", 0)  # Gemma's scales are counted from 1
    for leaf in model.names.leaves:
        for layer in model.names.layers_of(leaf.path):
            shape = shapes[leaf.path].shape[0 if layer is None else 1 :]
            array = rng.normal(0, 0.2, shape) + one * leaf.path.endswith("scale")
            array = names.to_file(leaf.layout, array)
            key = model.names.written(leaf).format(layer)
            tensors[key] = np.ascontiguousarray(array, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def texts(lengths=LENGTHS, seed=0):
    """Lists of ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, n).tolist() for n in lengths]


def packed(texts, padding=3, virtual=()):
    """All texts in one row, [1, t], and the targets of each; virtual: ids before each."""
    arrays = {"input_ids": [], "segments": [], "positions": [], "targets": []}
    for number, ids in enumerate(texts):
        ids = [*virtual, *ids]
        arrays["input_ids"] += ids
        arrays["segments"] += [number + 1] * len(ids)
        arrays["positions"] += range(len(ids))
        unlearned = [-1] * (len(virtual) - 1)
        arrays["targets"] += [*unlearned, *ids[max(len(virtual), 1) :], -1]
    for name, array in arrays.items():
        array += [-1 if name == "targets" else 0] * padding
    return {name: np.array([array], np.int32) for name, array in arrays.items()}


def both(texts, virtual=()):
    """All texts in the first row, and then each in a row of its own."""
    together = packed(texts, virtual=virtual)
    width, rows = together["input_ids"].shape[1], [together]
    for ids in texts:
        rows.append(packed([ids], width - len(ids) - len(virtual), virtual))
    return {name: np.concatenate([row[name] for row in rows]) for name in together}


def of_both(outputs, texts, virtual=0):
    """[(a text's outputs in the packed row, those of its own row)] of `both`."""
    pairs, start = [], 0
    for number, ids in enumerate(texts):
        n = len(ids) + virtual
        pairs.append((outputs[0, start : start + n], outputs[number + 1, :n]))
        start += n
    return pairs


def asked(batch, *names):
    """What the model is to read of a batch: its tokens, and what is named."""
    return {name: batch[name] for name in ("input_ids", "segments", "positions", *names)}
