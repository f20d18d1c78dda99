"""Our causal language models against transformers and PEFT (PyTorch, float32)."""

import copy
import json

import flax.linen as nn
import hugging
import jax
import numpy as np
import peft as hf
import pytest
import tiny
import tiny_causal
import torch
import transformers
from trained import Trained

from bmft import export, models, peft, tree
from bmft.models import causal, weights
from bmft.peft import files

TEXTS = tiny_causal.texts()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (transformers' model, its folder)}, made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            settings = dict(tiny_causal.CONFIGS[name])
            config = transformers.CONFIG_MAPPING[settings["model_type"]](**settings)
            config._attn_implementation = "eager"  # the one that caps scores
            theirs = hugging.random_model(config, transformers.AutoModelForCausalLM)
            if "gemma" in name:  # its norms' scales are counted from 1
                for key, weight in theirs.named_parameters():
                    weight.data -= float("norm" in key)
            folder = tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder)
            made[name] = theirs, folder
        return made[name]

    return get


def their_logits(model, texts=TEXTS):
    """[n, v] of each text."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    seen = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=seen).logits.float().numpy()
    return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


def close(ours, want, virtual=0, atol=1e-5):
    for pair, theirs in zip(tiny_causal.of_both(ours, TEXTS, virtual), want, strict=True):
        for logits in pair:
            np.testing.assert_allclose(logits[virtual:], theirs, atol=atol)


@pytest.mark.parametrize("name", tiny_causal.CONFIGS)
def test_logits(saved, name):
    theirs, folder = saved(name)
    model = models.find(str(folder))
    read = weights.load(model, jax.random.key(0))
    assert read.fresh == ()
    batch = tiny_causal.asked(tiny_causal.both(TEXTS))
    close(tiny.hasty(model.module.apply)({"params": read.params}, batch), their_logits(theirs))


def test_an_exported_model(saved, tmp_path):
    """GPT-2's kernels lie [in, out], a head's [out, in]."""
    theirs, folder = saved("gpt2_untied")
    model = models.find(str(folder))
    tensors = export.tensors(model.names, tree.flatten(read(model)))
    other = copy.deepcopy(theirs)
    for weight in other.parameters():
        weight.data.zero_()
    told = other.load_state_dict({key: torch.tensor(x) for key, x in tensors.items()}, strict=True)
    assert not told.missing_keys
    for one, want in zip(their_logits(other), their_logits(theirs), strict=True):
        np.testing.assert_array_equal(one, want)


def read(model):
    return weights.load(model, jax.random.key(0)).params


# --- PEFT ------------------------------------------------------------------------------------

LORA = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1}
THEIRS = {
    "q and v": ("llama", hf.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"])),
    "all-linear": ("qwen3", hf.LoraConfig(**LORA, use_rslora=True, target_modules="all-linear")),
    "tied head": ("llama", hf.LoraConfig(**LORA, target_modules=["lm_head", "up_proj"])),
    "embedding": ("gemma", hf.LoraConfig(**LORA, target_modules=["embed_tokens", "k_proj"])),
    "c_attn": ("gpt2", hf.LoraConfig(**LORA, target_modules=["c_attn"], fan_in_fan_out=True)),
    "prefix": ("llama", hf.PrefixTuningConfig(num_virtual_tokens=4)),
    "prefix of gpt2": ("gpt2", hf.PrefixTuningConfig(num_virtual_tokens=4)),
    "prompt": ("gemma", hf.PromptTuningConfig(num_virtual_tokens=4)),
}


@pytest.mark.parametrize("case", THEIRS)
def test_adapters_of_peft(saved, tmp_path, case):
    name, config = THEIRS[case]
    theirs, folder = saved(name)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    adapted = hf.get_peft_model(copy.deepcopy(theirs), config).eval()
    rng = np.random.default_rng(0)
    for _, weight in sorted(adapted.named_parameters()):
        if weight.requires_grad:
            weight.data += torch.tensor(rng.normal(0, 0.1, weight.shape), dtype=torch.float32)
    adapted.save_pretrained(tmp_path)  # of the head and the embedding it writes the base's, too
    model = models.find(str(folder))
    adapter = files.read(tmp_path, model, fingerprint="of whatever base")
    variables = files.insert(adapter, {"params": read(model)})
    virtual = peft.virtual_ids(adapter.methods, model)
    batch = tiny_causal.asked(tiny_causal.both(TEXTS, virtual))
    ours = tiny.hasty(peft.attach(adapter.methods, model).apply)(variables, batch)
    want = adapter_logits(adapted, len(virtual))
    assert max(np.abs(a - b).max() for a, b in zip(want, their_logits(theirs), strict=True)) > 0.01
    close(ours, want, len(virtual))


def adapter_logits(model, virtual=0):
    """[n, v] of each text; PEFT gives those of virtual tokens, too."""
    with torch.no_grad():
        each = [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in TEXTS]
    return [logits[virtual:] for logits in each]


GROUP = {"rank": 3, "alpha": 7.0}
OURS = {
    "q and v": ("llama", {"lora": GROUP}),
    "tied head": ("llama", {"lora": GROUP | {"targets": ("lm_head", "all-linear")}}),
    "untied head": ("qwen3", {"lora": GROUP | {"targets": ("lm_head", "down")}}),
    "c_attn": ("gpt2", {"lora": GROUP | {"targets": ("c_attn", "mlp.up"), "bias": "lora_only"}}),
    "all of gpt2": ("gpt2", {"lora": GROUP | {"targets": ("all-linear",)}}),
    "ia3": ("gpt2", {"ia3": {"targets": ("c_attn", "mlp.down")}}),
    "norms": ("llama", {"norm_tuning": {}}),
    "prefix": ("llama", {"prefix_tuning": {"tokens": 4}}),
}


@pytest.mark.parametrize("case", OURS)
def test_adapters_for_peft(saved, tmp_path, case):
    name, groups = OURS[case]
    theirs, folder = saved(name)
    model = models.find(str(folder))
    trained = Trained(model, read(model), groups, size=0.1)
    trained.write(tmp_path, labels=None)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["task_type"] == "CAUSAL_LM"
    assert told.get("fan_in_fan_out", False) is (name == "gpt2" and "lora" in groups)
    adapted = hf.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
    batch = tiny_causal.asked(tiny_causal.both(TEXTS))
    ours = tiny.hasty(peft.attach(trained.methods, model).apply)(trained.variables, batch)
    want = adapter_logits(adapted)
    assert max(np.abs(a - b).max() for a, b in zip(want, their_logits(theirs), strict=True)) > 0.01
    close(ours, want)
    again = files.read(tmp_path, model).leaves
    for path, leaf in again.items():
        np.testing.assert_array_equal(leaf, tree.flatten(trained.variables)[path], err_msg=path)


# --- the loss --------------------------------------------------------------------------------


class Loss(nn.Module):
    """The loss of logits, by a head that leaves them as they are."""

    @nn.compact
    def __call__(self, logits, batch):
        one = np.eye(logits.shape[-1], dtype=np.float32)
        return causal.outputs(causal.TiedHead(name="head"), logits, batch, (one,), chunk=16)


def test_smoothed_loss():
    """torch's, of which the loss of LoRA's repository is the mean (examples/NLG/src/model.py)."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (40, 19)).astype(np.float32), rng.integers(-1, 19, 40)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-1, reduction="none")
    wanted = torch.tensor(logits, requires_grad=True)
    value = theirs(wanted, torch.tensor(targets))
    value.sum().backward()
    batch = {"targets": np.int32(targets)[None], "smoothing": np.float32(0.1)}

    def loss(logits):
        each = Loss().apply({}, logits[None], batch)[0]
        return each.sum(), each

    (_, each), slope = tiny.hasty(jax.value_and_grad(loss, has_aux=True))(logits)
    np.testing.assert_allclose(each, value.detach(), atol=1e-5)
    np.testing.assert_allclose(slope, wanted.grad, atol=1e-6)
