"""Our beam search, and n-grams that do not come again, against transformers' (PyTorch, float32)."""

import hugging
import jax
import pytest
import tiny_causal
import torch
import transformers
from transformers.generation.logits_process import LogitsProcessor, NoRepeatNGramLogitsProcessor

from bmft import generate, models, peft
from bmft.generate import Sampling
from bmft.models import weights

PROMPTS = tiny_causal.texts((7, 1, 12), seed=3)
PROMPTS[0] += PROMPTS[0][:3]  # it holds n-grams itself
TOKENS, SEEDS = 12, (0, 1)
# (how, ends)
CASES = {
    "greedy": (Sampling(no_repeat_ngram=2), (2,)),
    "e2e": (Sampling(beams=5, length_penalty=0.8, no_repeat_ngram=2, ngrams_of="answer"), (2, 7)),
    "long": (
        Sampling(beams=4, length_penalty=2.0, repetition_penalty=1.2),
        (2, 7, 11, 19, 23, 31, 40),
    ),
}


class OfTheAnswer(LogitsProcessor):
    """Theirs, without the prompt."""

    def __init__(self, size, prompt):
        self.theirs, self.prompt = NoRepeatNGramLogitsProcessor(size), prompt

    def __call__(self, input_ids, scores):
        return self.theirs(input_ids[:, self.prompt :], scores)


def theirs(model, prompt, how, ends):
    asked = {"num_beams": how.beams, "early_stopping": False, "length_penalty": how.length_penalty}
    asked |= {"repetition_penalty": how.repetition_penalty, "eos_token_id": list(ends)}
    if how.ngrams_of == "text":
        asked["no_repeat_ngram_size"] = how.no_repeat_ngram
    else:
        asked["logits_processor"] = [OfTheAnswer(how.no_repeat_ngram, len(prompt))]
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
    made = model.generate(ids, **settings, **asked)[0, len(prompt) :].tolist()
    over = [i + 1 for i, token in enumerate(made) if token in ends]
    return made[: over[0]] if over else made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(our model, [(transformers', our variables) of each seed])"""
    config = transformers.GPT2Config(**tiny_causal.GPT2, use_cache=True)
    found = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"gpt2_{seed}")
        torchs = hugging.random_model(config, transformers.GPT2LMHeadModel, seed)
        torchs.save_pretrained(folder)
        model = models.find(str(folder))
        found.append((torchs, {"params": weights.load(model, jax.random.key(0)).params}))
    return model, found


@pytest.mark.parametrize("case", CASES)
def test_texts_are_theirs(pairs, case):
    (model, found), (how, ends) = pairs, CASES[case]
    apply = peft.attach((), model).apply
    generator = generate.Generator(apply, None, model, tokens=TOKENS, ends=ends, burst=TOKENS)
    lengths = set()
    for torchs, variables in found:
        want = [theirs(torchs, prompt, how, ends) for prompt in PROMPTS]
        *_, texts = generator.with_variables(variables)(PROMPTS, how)
        assert texts == want
        lengths |= set(map(len, want))
    assert len(lengths) > 1 or how.beams == 1  # some were over before the others
