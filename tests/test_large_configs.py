"""configs/large_lora.py: such models fit the names, the meshes and the memory it speaks of.

No weights: the configs of the models as they are published, in short, and shapes.
"""

import json
import math

import pytest
from jax.sharding import AbstractMesh

from bmft import prepare, quantize, sharding, tree, writing
from bmft.config import read
from bmft.data import dialog_sources
from bmft.models import weights
from bmft.peft import portable

LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
LLAMA |= {"num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False}
CONFIGS = {
    "llama3_8b": LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"intermediate_size": 14336},
    "llama3_70b": LLAMA
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"intermediate_size": 28672},
    "qwen3_8b": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096}
    | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"head_dim": 128, "intermediate_size": 12288, "tie_word_embeddings": False}
    | {"max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6},
}
# variant: (numbers of the base, of LoRA; devices, GB of the base on each)
SIZES = {
    "llama3_8b": (8_030_261_248, 167_772_160, 8, 0.715),
    "llama3_70b": (70_553_706_496, 828_375_040, 16, 2.488),
    "qwen3_8b": (8_190_735_360, 174_587_904, 8, 0.761),
}


def nf4_shapes(path, shape):
    """{leaf: shape} of a quantized kernel [l, in, out]."""
    count, inputs, outputs = shape
    blocks = inputs // 64
    return {
        "nf4": ((count, outputs, inputs // 2), 1),
        "nf4_absmax": ((count, outputs, blocks), 1),
        "nf4_scale": ((count, math.ceil(outputs * blocks / 256)), 4),
        "nf4_offset": ((count,), 4),
    }


@pytest.mark.parametrize("variant", SIZES)
def test_it_fits(variant, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[variant]))
    argv = [f"--config=configs/large_lora.py:{variant}", f"--config.model.name={tmp_path}"]
    more = {"data": dialog_sources.KEYS, "generate": writing.KEYS}
    config = read(argv, default=None, groups=lambda c: prepare.groups(c) | more).config
    model = prepare.find_model(config, None)
    methods = prepare.find_methods(config, model)
    numbers, added, devices, share = SIZES[variant]
    shapes = tree.flatten(weights.shapes(model))
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == numbers
    lora = portable.expected(methods, model)[1]
    assert sum(math.prod(leaf.shape) for leaf in lora.values() if len(leaf.shape) > 2) == added

    mesh = AbstractMesh((1, devices, 1), sharding.AXES)
    rule, held = sharding.of_leaf(mesh, model.sharding), 0
    quantized = weights.quantized(model, config.model.quantize, lambda path: False)
    for path, leaf in shapes.items():
        parts = {f"params/{path}": (leaf.shape, 2)}
        if path in quantized:
            module = path.removesuffix("/kernel")
            quantize.check("nf4", path, leaf.shape[1])
            parts = {f"quant/{module}/{n}": s for n, s in nf4_shapes(path, leaf.shape).items()}
        for name, (shape, size) in parts.items():
            place = rule(name.removeprefix("params/"), shape)
            held += math.prod(place.shard_shape(shape)) * size
    assert held / 1e9 == pytest.approx(share, rel=0.01)
