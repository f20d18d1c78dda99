"""The tensors of a GGUF file under the names, and in the layout, of Hugging Face's files.

    blk.3.attn_q.weight  ->  model.layers.3.self_attn.q_proj.weight, its rows in another order

What llama.cpp changes when it converts a model is undone here: the order of query and key rows
(`llama`: it rotates neighbouring values of a head, transformers values half a head apart), the
norms of Gemma (stored as 1 + w), GPT-2's Conv1D (stored [out, in]; its files have [in, out]).
"""

import functools
from typing import NamedTuple

import numpy as np

from bmft.errors import Mistake, nearest
from bmft.models import gguf_file

# A tensor's name without .weight or .bias: llama.cpp's -> Hugging Face's; {} is the layer.
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_HEAD_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_GEMMA2 = _LLAMA | {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{}.attn_norm": "transformer.h.{}.ln_1",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}
# general.architecture -> its names. bmft/models/gguf_settings.py says what else is known of each.
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _HEAD_NORMS,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2 | _HEAD_NORMS,
    "gpt2": _GPT2,
}
PERMUTED = {"llama": {"blk.{}.attn_q": "head_count", "blk.{}.attn_k": "head_count_kv"}}
SHIFTED = ("gemma2", "gemma3")  # every norm
TRANSPOSED = {"gpt2": ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}
# Of the rotation, which the settings hold: Llama 3's factors, and frequencies in very old files.
ROTATION = ("rope_freqs.weight", "attn_rot_embd.weight")


class Named(NamedTuple):
    """A tensor as Hugging Face's files have it, and where it comes from."""

    stored: gguf_file.Stored
    shape: tuple  # as in Hugging Face's files
    heads: int = 0  # whose rows llama.cpp permuted; 0: it did not
    transposed: bool = False
    shift: float = 0.0  # what llama.cpp added


def architecture(path):
    """general.architecture of a file; Mistake for one that is not known."""
    found = gguf_file.metadata(path).get("general.architecture")
    if found not in ARCHITECTURES:
        raise Mistake(f"{path}: unknown architecture {found!r}; {nearest(found, ARCHITECTURES)}")
    return found


def setting(path, key, default=None):
    """The architecture's metadata `key`, or default. A list by layer is taken if all are equal."""
    key = f"{architecture(path)}.{key}"
    found = gguf_file.metadata(path).get(key, default)
    if isinstance(found, np.ndarray):
        if len(set(found.tolist())) != 1:
            raise Mistake(f"{path}: {key} differs by layer, or is empty: {found.tolist()}")
        found = found.tolist()[0]
    return found


def index(path):
    """{Hugging Face's name: Named} of one file; a tensor of no known name keeps its own."""
    return _index(path, gguf_file.stamp(path))


@functools.lru_cache(maxsize=gguf_file.PARTS)
def _index(path, _stamp):
    table = ARCHITECTURES[architecture(path)]
    found = {}
    for stored in gguf_file.header(path).tensors.values():
        if not stored.name.endswith(ROTATION):
            pattern, layer, kind = _parts(stored.name)
            theirs = table.get(pattern)
            name = stored.name if theirs is None else f"{theirs.format(layer)}.{kind}"
            found[name] = _named(path, stored, pattern)
    if "lm_head.weight" in found and is_tied(path):
        del found["lm_head.weight"]
    return found


def is_tied(path):
    """Is the head the embedding: not in the file, or there as a copy (GPT-2's, at times)?"""
    there = gguf_file.tensors(path)
    head, embedding = there.get("output.weight"), there.get("token_embd.weight")
    if head is None or embedding is None:
        return head is None
    if (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    return gguf_file.same_bytes(head, embedding)


def read(named, cut):
    """A slice of a tensor as float32, in Hugging Face's layout. cut: a slice of each axis."""
    rows, *columns = cut[::-1] if named.transposed else cut
    if named.heads:
        rows = _row_order(named.shape[0], named.heads)[rows]
    found = gguf_file.values(named.stored, rows, *columns)
    if named.shift:
        found = found - np.float32(named.shift)
    return found.T if named.transposed else found


def _parts(name):
    """blk.3.attn_q.weight -> blk.{}.attn_q, 3, weight"""
    module, _, kind = name.rpartition(".")
    head, _, rest = module.partition(".")
    layer, _, rest = rest.partition(".")
    return (f"blk.{{}}.{rest}", layer, kind) if head == "blk" else (module, None, kind)


def _named(path, stored, pattern):
    arch = architecture(path)
    key = PERMUTED.get(arch, {}).get(pattern)
    heads = setting(path, f"attention.{key}") or setting(path, "attention.head_count") if key else 0
    if heads is None or (heads and stored.shape[0] % (2 * heads)):
        raise Mistake(
            f"{path}: tensor {stored.name!r} has {stored.shape[0]} rows, of {heads} heads"
        )
    turned = pattern.rpartition(".")[2] in TRANSPOSED.get(arch, ()) and len(stored.shape) == 2
    shape = stored.shape[::-1] if turned else stored.shape
    shift = float(arch in SHIFTED and pattern.endswith("norm"))
    return Named(stored, shape, heads, turned, shift)


def _row_order(rows, heads):
    """Where llama.cpp put each of our rows: it interleaves the halves of each head."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
