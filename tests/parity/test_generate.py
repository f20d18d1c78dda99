"""Our generation against transformers' (PyTorch, float32)."""

import hugging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_causal
import torch
import transformers
from transformers.generation import logits_process as theirs

from bmft import generate, models, peft
from bmft.models import weights

PROMPTS = tiny_causal.texts((7, 1, 12, 4), seed=3)


@pytest.mark.parametrize(("name", "penalty"), [("gemma2", 1.0), ("gpt2", 1.3)])
def test_the_likeliest_text(tmp_path, name, penalty):
    """Longer than gemma2's windows; one prompt at a time there, all at once here."""
    settings = tiny_causal.CONFIGS[name]
    config = transformers.CONFIG_MAPPING[settings["model_type"]](**settings)
    config._attn_implementation = "eager"
    torchs = hugging.random_model(config, transformers.AutoModelForCausalLM)
    torchs.save_pretrained(tmp_path)
    how = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": penalty}
    want = [torchs.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist() for ids in PROMPTS]
    model = models.find(str(tmp_path))
    variables = {"params": weights.load(model, jax.random.key(0)).params}
    apply = peft.attach((), model).apply
    generator = generate.Generator(apply, variables, model, tokens=20, ends=(2,), burst=6)
    *_, texts = generator(PROMPTS, generate.Sampling(repetition_penalty=penalty))
    assert texts == want
    assert len(set(sum(texts, []))) > 2  # it says something


SCORES = np.random.default_rng(0).normal(0, 2, (4, 31)).astype(np.float32)
PROCESSORS = [
    (theirs.TopKLogitsWarper(5), lambda scores: generate.top_k(scores, 5)),
    (theirs.TopPLogitsWarper(0.6), lambda scores: generate.top_p(scores, 0.6)),
    (theirs.TopPLogitsWarper(0.01), lambda scores: generate.top_p(scores, 0.01)),
    (theirs.MinPLogitsWarper(0.1), lambda scores: generate.min_p(scores, 0.1)),
]


@pytest.mark.parametrize("number", range(len(PROCESSORS)))
def test_processors(number):
    their, our = PROCESSORS[number]
    want = their(None, torch.tensor(SCORES)).numpy()
    np.testing.assert_array_equal(our(jnp.asarray(SCORES)), want)


def test_penalty():
    ids = torch.tensor([[3, 5], [5, 5], [1, 30], [0, 2]])
    want = theirs.RepetitionPenaltyLogitsProcessor(1.4)(ids, torch.tensor(SCORES))
    seen = np.zeros(SCORES.shape, bool)
    np.put_along_axis(seen, ids.numpy(), True, 1)
    ours = generate.penalised(jnp.asarray(SCORES), seen, 1.4)
    np.testing.assert_allclose(ours, want.numpy(), rtol=1e-6)
