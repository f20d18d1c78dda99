"""Our causal language models against transformers (PyTorch, float32)."""

import hugging
import jax
import numpy as np
import pytest
import tiny
import tiny_causal
import torch
import transformers

from bmft import models
from bmft.models import weights

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
