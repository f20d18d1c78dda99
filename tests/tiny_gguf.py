"""Tiny GGUF files, written by package gguf: what the tests of reading them run on."""

import gguf
import numpy as np

# Where the scales (float16) of a block lie, of the kinds that package gguf cannot write.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def write(path, metadata, tensors=(), architecture="llama"):
    """metadata: {key: str, bool, int, float or list}; tensors: {name: array, or (bytes, kind)}."""
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}
    kinds |= {float: writer.add_float32, list: writer.add_array}
    for key, value in metadata.items():
        kinds[type(value)](key, value)
    for name, tensor in dict(tensors).items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor.astype(np.float32), "F32")
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(kind, shape, seed=0):
    """A tensor of a kind, as in a file: float32 or float16, or bytes [rows, bytes]."""
    random = np.random.default_rng(seed)
    if kind not in SCALES:
        return gguf.quantize(random.normal(size=shape).astype(np.float32), TYPE[kind])
    values, width = gguf.GGML_QUANT_SIZES[TYPE[kind]]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // values, width), np.uint8)
    for at in SCALES[kind]:
        blocks[..., at : at + 2] = (
            random.normal(size=(*blocks.shape[:-1], 1)).astype("f2").view("u1")
        )
    return blocks.reshape(*shape[:-1], -1)


TYPE = gguf.GGMLQuantizationType.__members__


def sizes(architecture="llama", **changes):
    """Metadata of a model of two layers, as llama.cpp writes them; {key without its group: value},
    None leaves one out."""
    found = {
        "context_length": 64,
        "embedding_length": 24,
        "block_count": 2,
        "feed_forward_length": 40,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 4,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {f"{architecture}.{key}": value for key, value in found.items() if value is not None}
