"""GGUF files: every kind of block, every architecture's layout and settings, and damaged ones."""

import gguf
import numpy as np
import pytest
import tiny_gguf

from bmft import models
from bmft.errors import Mistake
from bmft.models import gguf_file, gguf_names, gguf_settings, tensors

DOWN = "model.layers.0.mlp.down_proj.weight"


def read(path, name, *cut):
    with tensors.opened(tensors.index(path)[name].file) as file:
        return file.read(name, cut)


@pytest.mark.parametrize("kind", gguf_file.KINDS)
def test_blocks(tmp_path, kind):
    array = tiny_gguf.packed(kind, (6, 512))
    path = tiny_gguf.write(tmp_path / "a.gguf", {}, {"blk.0.ffn_down.weight": (array, kind)})
    whole = gguf.dequantize(array, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(whole).all()
    assert np.std(whole) > 0.1
    assert tensors.index(path)[DOWN].shape == (6, 512)
    for rows in (slice(0, 6), slice(1, 4), slice(5, 6)):
        for columns in (slice(0, 512), slice(256, 512), slice(40, 300), slice(511, 512)):
            found = read(path, DOWN, rows, columns)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, whole[rows, columns])


def permuted(array, heads):
    """As llama.cpp's LlamaModel.permute describes it: each head's halves, interleaved."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


LAYER = "model.layers.1."
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
}
LLAMA = ATTENTION | {
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA = LLAMA | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
LAYERS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | HEAD_NORMS,
    "gemma2": GEMMA,
    "gemma3": GEMMA | HEAD_NORMS,
    "gpt2": GPT2,
}


@pytest.mark.parametrize("architecture", LAYERS)
def test_layouts(tmp_path, architecture):
    """Each tensor, with a bias beside each matrix, as llama.cpp writes it and as it is read."""
    written, expected = {}, {}
    layer = "transformer.h.1." if architecture == "gpt2" else LAYER
    for i, (name, theirs) in enumerate(LAYERS[architecture].items()):
        norm = name.endswith("norm")
        rows = 8 if name == "attn_k" else 24
        for kind, shape in {"weight": (rows,) if norm else (rows, 20 + i), "bias": (rows,)}.items():
            array = normal(*shape)
            expected[f"{layer}{theirs}.{kind}"] = array
            if architecture == "llama" and name in ("attn_q", "attn_k"):
                array = permuted(array, 6 if name == "attn_q" else 2)
            if architecture.startswith("gemma") and norm and kind == "weight":
                array = array + 1
            if architecture == "gpt2" and array.ndim == 2:
                expected[f"{layer}{theirs}.{kind}"] = array.T
            written[f"blk.1.{name}.{kind}"] = array
        if norm and architecture.startswith("gemma"):  # has no biases
            del written[f"blk.1.{name}.bias"], expected[f"{layer}{theirs}.bias"]
    path = tiny_gguf.write(
        tmp_path / "a.gguf", tiny_gguf.sizes(architecture), written, architecture
    )
    found = tensors.index(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: array.shape for name, array in expected.items()
    }
    for name, array in expected.items():
        for cut in ((slice(0, 8), slice(0, 20)), (slice(3, 7), slice(5, 9))):
            cut = cut[: array.ndim]
            np.testing.assert_allclose(read(path, name, *cut), array[cut], atol=3e-7)


def test_what_lies_outside_the_layers(tmp_path):
    outside = {"token_embd.weight": normal(7, 24), "output_norm.weight": normal(24)}
    head = {"output.weight": normal(7, 24) + 1, "rope_freqs.weight": np.ones(2)}

    def names(architecture, **more):
        path = tmp_path / f"{architecture}{len(more)}.gguf"
        tiny_gguf.write(path, tiny_gguf.sizes(architecture), outside | more, architecture)
        return path, sorted(tensors.index(path))

    path, found = names("llama", **head)
    assert found == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert not gguf_settings.settings(path)["tie_word_embeddings"]
    path, found = names("gpt2", **{"position_embd.weight": normal(9, 24), "strange": normal(2)})
    known = ["transformer.ln_f.weight", "transformer.wpe.weight", "transformer.wte.weight"]
    assert found == ["strange", *known]  # a tensor nobody knows is not passed over
    copied = {"output.weight": outside["token_embd.weight"]}
    path, found = names("llama", **copied)
    assert found == ["model.embed_tokens.weight", "model.norm.weight"]
    assert gguf_settings.settings(path)["tie_word_embeddings"]


def test_split_files(tmp_path):
    names = [f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    first = {"token_embd.weight": normal(7, 24)}
    tiny_gguf.write(tmp_path / names[0], tiny_gguf.sizes(), first)
    query = normal(24, 24)
    tiny_gguf.write(tmp_path / names[1], {}, {"blk.0.attn_q.weight": permuted(query, 6)})
    for name in names:  # by either of them; the second knows its heads from the first
        found = tensors.index(tmp_path / name)
        assert sorted(found) == ["model.embed_tokens.weight", f"{ATTENTION_0}q_proj.weight"]
        whole = (slice(0, 24), slice(0, 24))
        there = read(tmp_path / name, f"{ATTENTION_0}q_proj.weight", *whole)
        np.testing.assert_array_equal(there, query)
        assert tensors.paths(tmp_path / name) == [tmp_path / part for part in names]
    assert models.locate(str(tmp_path)) == tmp_path / names[0]
    tiny_gguf.write(tmp_path / "other.gguf", {})
    with pytest.raises(Mistake, match=f"2 GGUF models; name one of them: {names[0]}, other.gguf"):
        models.locate(str(tmp_path))
    (tmp_path / names[1]).unlink()
    with pytest.raises(Mistake, match=f"1 of its 2 parts are not beside it: {names[1]!r}"):
        tensors.index(tmp_path / names[0])


ATTENTION_0 = "model.layers.0.self_attn."


def replaced(old, new):
    return lambda content: content.replace(old, new, 1)


DAMAGE = [
    (lambda content: b"", "0 bytes are no GGUF file"),
    (lambda content: b"PK\3\4" + content[4:], r"not a GGUF file: it begins with b'PK"),
    (lambda content: content[:4] + b"\1\0\0\0" + content[8:], "GGUF version 1 is not read"),
    (lambda content: content[:4] + b"\0\0\0\3" + content[8:], "big-endian is not read"),
    (lambda content: content[:-50], "cut off: tensor 'token_embd.weight' ends at byte"),
    (lambda content: content[:200], "its header is damaged or cut off at byte"),
    (lambda content: content[:8] + b"\xff" * 16 + content[24:], "its header is damaged or cut off"),
    (lambda content: content[:8] + b"\xff\0\0\0\0\0\0\0" + content[16:], "damaged or cut off|axes"),
    (replaced(b"general.arch", b"\xff" * 12), "its header is damaged or cut off"),
    (replaced(b"embd.weight\2\0\0\0", b"embd.weight\7\0\0\0"), "'token_embd.weight' has 7 axes"),
    (replaced(b"llama.block_count\4", b"llama.block_count\x63"), "there is no metadata type 99"),
    (replaced(b"llama.block_count", b"llama.block_tount"), "llama.block_tount = 2 is not known"),
    (
        replaced(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lhama"),
        "architecture 'lhama'.* 'llama'",
    ),
]


@pytest.mark.parametrize("damage, says", DAMAGE)
def test_damaged_files(tmp_path, damage, says):
    path = tmp_path / "a.gguf"
    tiny_gguf.write(path, tiny_gguf.sizes(), {"token_embd.weight": normal(7, 24)})
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    with pytest.raises(Mistake, match=says) as refused:
        gguf_settings.settings(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_kinds_that_are_not_read(tmp_path):
    path = tmp_path / "a.gguf"
    tiny_gguf.write(path, {}, {"x.weight": (np.zeros((2, 136), np.uint8), "IQ4_XS")})
    with pytest.raises(Mistake, match="'x.weight' is of type IQ4_XS; these are read: F32, .*Q6_K"):
        tensors.index(path)
    content = path.read_bytes().replace(b"\x17\0\0\0" + b"\0" * 8, b"\x77\0\0\0" + b"\0" * 8)
    path.write_bytes(content)
    with pytest.raises(Mistake, match="type number 119, which package gguf does not know"):
        tensors.index(path)
    with pytest.raises(Mistake, match="No such file"):
        tensors.index(tmp_path / "b.gguf")


def llama3(factor, base=500000.0, width=128, length=8192, low=1.0, high=4.0):
    """What llama.cpp writes as rope_freqs.weight."""
    waves = length * base ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LOCAL = {"sliding_attention": ROTATION}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
WIDE = {"attention__key_length": 8, "attention__value_length": 8, "rope__dimension_count": None}
SCALED = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
# architecture, metadata, further tensors, what the settings have beside the common ones
SETTINGS = {
    "llama": ("llama", {}, {}, {"head_dim": 4, "rope_parameters": ROTATION}),
    "llama 3": (
        "llama",
        dict.fromkeys(("attention__key_length", "attention__value_length"), 128)
        | {"rope__dimension_count": 128, "rope__freq_base": 500000.0},
        {"rope_freqs.weight": llama3(32.0)},
        {"head_dim": 128, "rope_parameters": LLAMA3},
    ),
    "factors of one": (
        "llama",
        {},
        {"rope_freqs.weight": np.ones(2)},
        {"rope_parameters": ROTATION},
    ),
    "biases": (
        "llama",
        {"attention__head_count_kv": [2, 2]},
        {"blk.0.attn_q.bias": np.zeros(24), "blk.0.ffn_up.bias": np.zeros(40)},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    ),
    "mistral": (
        "llama",
        {"attention__sliding_window": 16},
        {},
        {"model_type": "mistral", "sliding_window": 16},
    ),
    "qwen2": (
        "qwen2",
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
        | {"rope__scaling__original_context_length": 32, "attention__head_count_kv": None},
        {"output.weight": np.ones((7, 24))},
        {"rope_parameters": ROTATION | YARN, "tie_word_embeddings": False}
        | {"num_key_value_heads": 6},
    ),
    "qwen3": ("qwen3", WIDE, {}, {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        WIDE | {"attention__sliding_window": 16, "final_logit_softcapping": 20.0},
        {},
        {"sliding_window": 16, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 50.0}
        | {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    ),
    "gemma2 27B": (
        "gemma2",
        WIDE | {"attention__sliding_window": 16, "block_count": 46},
        {},
        {"query_pre_attn_scalar": 4, "head_dim": 8, "sliding_window": 16},
    ),
    "gemma3": (
        "gemma3",
        WIDE | SCALED | {"attention__sliding_window": 16, "block_count": 7},
        {},
        {
            "rope_parameters": LOCAL
            | {"full_attention": ROTATION | {"rope_type": "linear", "factor": 8.0}}
        }
        | {"layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]}
        | {"model_type": "gemma3_text", "final_logit_softcapping": None}
        | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "gemma3, all layers alike": (
        "gemma3",
        WIDE | {"rope__freq_base_swa": 500.0},
        {},
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 8}
        | {"layer_types": ["full_attention"] * 2}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": ROTATION,
            }
        },
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(tmp_path, case):
    """They are what the configuration class of transformers would have, given the same."""
    from transformers import CONFIG_MAPPING

    architecture, changes, more, expected = SETTINGS[case]
    path = tmp_path / "a.gguf"
    about = tiny_gguf.sizes(architecture, **changes)
    about |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 5}
    about |= {"tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.eot_token_id": 3}
    tiny_gguf.write(path, about, {"token_embd.weight": normal(7, 24)} | more, architecture)
    common = {"model_type": architecture, "vocab_size": 7, "hidden_size": 24}
    common |= {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
    common |= {"num_hidden_layers": changes.get("block_count", 2), "max_position_embeddings": 64}
    common |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    common |= {"bos_token_id": 5, "eos_token_id": [6, 3], "pad_token_id": None}
    common |= {"head_dim": 8 if "attention__key_length" in changes else 4}
    found = gguf_settings.settings(path)
    theirs = CONFIG_MAPPING[found["model_type"]]
    wanted = theirs(**(common | expected)).to_dict()
    given = theirs(**{key: found[key] for key in found if key != "architectures"}).to_dict()
    assert given == wanted
    assert {key: found[key] for key in common | expected} == common | expected


def test_settings_of_gpt2(tmp_path):
    path = tmp_path / "a.gguf"
    no = dict.fromkeys(("attention__head_count_kv", "rope__freq_base", "rope__dimension_count"))
    no |= {"attention__layer_norm_rms_epsilon": None, "attention__layer_norm_epsilon": 1e-5}
    about = tiny_gguf.sizes("gpt2", **no) | {"tokenizer.ggml.eos_token_id": 6}
    tiny_gguf.write(path, about, {"token_embd.weight": normal(7, 24)}, "gpt2")
    expected = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 64}
    expected |= {"n_inner": 40, "vocab_size": 7, "layer_norm_epsilon": 1e-5, "eos_token_id": 6}
    found = gguf_settings.settings(path)
    assert {key: found[key] for key in expected} == expected


REFUSED = [
    ({"embedding_length": None}, {}, "the metadata lack llama.embedding_length"),
    ({"attention__head_count": 0}, {}, "llama.attention.head_count is 0"),
    ({"block_count": "two"}, {}, "llama.block_count is 'two'"),
    ({"attention__value_length": 8}, {}, "attention.value_length is 8, and keys have 4"),
    ({"rope__dimension_count": 2}, {}, "rope.dimension_count is 2, and keys have 4"),
    (
        {"attention__head_count": [6, 4]},
        {},
        r"llama.attention.head_count differs by layer.*\[6, 4\]",
    ),
    ({"expert_count": 8}, {}, "llama.expert_count = 8 is not known"),
    ({"attention__causal": False}, {}, "llama.attention.causal = False is not known"),
    ({"logit_scale": 0.5}, {}, "llama.logit_scale = 0.5 is not known"),
    ({"rope__scaling__type": "longrope"}, {}, "rope.scaling.type 'longrope' is not known"),
    ({}, {"rope_freqs.weight": np.array([1.0, 3.0])}, "rope_freqs.weight is not a scaling"),
]


@pytest.mark.parametrize("changes, more, says", REFUSED)
def test_settings_that_are_refused(tmp_path, changes, more, says):
    path = tmp_path / "a.gguf"
    tiny_gguf.write(path, tiny_gguf.sizes(**changes), {"token_embd.weight": normal(7, 24)} | more)
    with pytest.raises(Mistake, match=says):
        gguf_settings.settings(path)


def test_heads_that_do_not_divide_the_rows(tmp_path):
    path = tmp_path / "a.gguf"
    tiny_gguf.write(path, tiny_gguf.sizes(), {"blk.0.attn_q.weight": normal(20, 24)})
    with pytest.raises(Mistake, match="'blk.0.attn_q.weight' has 20 rows"):
        tensors.index(path)


def test_smollm2():
    """The preset: its settings, and that its tensors are those of its architecture."""
    path = models.locate("smollm2")
    found = models.read_json(path)
    expected = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "head_dim": 64}
    expected |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    expected |= {"rms_norm_eps": 1e-5, "initializer_range": 0.02, "eos_token_id": 2}
    assert {key: found[key] for key in expected} == expected
    shapes = {name: tensor.shape for name, tensor in tensors.index(path).items()}
    assert len(shapes) == 2 + 9 * 30
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert sum(np.prod(shape) for shape in shapes.values()) == 134515008
    assert tensors.paths(path) == [path]


@pytest.mark.parametrize("architecture", gguf_names.ARCHITECTURES)
def test_names_are_those_of_package_gguf(architecture):
    """Which knows, for conversion, what each of Hugging Face's names becomes."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[architecture], 4)
    for name, theirs in gguf_names.ARCHITECTURES[architecture].items():
        if (name, architecture) != ("output", "gemma2"):  # which is always tied
            assert table.get_name(theirs.format(3)) == name.format(3)
