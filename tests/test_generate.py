"""Generation: how tokens are chosen, and that the cache and the batch are of no matter.

Against transformers' generate and its processors of logits: tests/parity/test_generate.py.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_causal
from trained import Trained

from bmft import generate, layers, models, peft
from bmft.errors import Mistake
from bmft.generate import Sampling
from bmft.models import weights
from bmft.peft import files, several

SCORES = np.log([[0.5, 0.25, 0.15, 0.07, 0.03], [0.1, 0.1, 0.4, 0.1, 0.3]]).astype(np.float32)
# (Sampling, which tokens of each row may be chosen)
KEPT = [
    (Sampling(1.0), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    (Sampling(0.5, top_k=2), [[0, 1], [2, 4]]),
    (Sampling(1.0, top_k=3), [[0, 1, 2], [0, 1, 2, 3, 4]]),  # three are equal, and one of them in
    (Sampling(1.0, top_p=0.7), [[0, 1], [2, 4]]),
    (Sampling(2.0, top_p=0.29), [[0], [2]]),  # 0.35 and 0.3 at this temperature
    (Sampling(1.0, min_p=0.4), [[0, 1], [2, 4]]),
    (Sampling(1.0, top_k=4, min_p=0.2), [[0, 1, 2], [0, 1, 2, 3, 4]]),
    (Sampling(0.0, top_k=4), [[0], [2]]),
    (Sampling(0.0, repetition_penalty=2.5), [[1], [4]]),
]


TWO = [Sampling(1.0, top_k=2), Sampling(0.5, top_k=2)]


@pytest.fixture(scope="module")
def drawn():
    """{Sampling: int [1000, 2], the tokens drawn of each row}, by one program."""
    seen = jnp.zeros((2, 5), bool).at[0, 0].set(True).at[1, 2].set(True)
    ways = [sampling for sampling, _ in KEPT] + TWO

    def draw(keys):
        return [generate.chosen(SCORES, seen, sampling, keys) for sampling in ways]

    tokens = tiny.hasty(jax.vmap(draw))(jax.random.split(jax.random.key(0), (1000, 2)))
    return dict(zip(ways, map(np.asarray, tokens), strict=True))


@pytest.mark.parametrize(("sampling", "kept"), KEPT, ids=lambda x: str(x)[:60])
def test_which_tokens_may_be_chosen(drawn, sampling, kept):
    assert [sorted(set(row.tolist())) for row in drawn[sampling].T] == kept


def test_shares_of_what_is_chosen(drawn):
    """Probabilities of 0.5 and 0.25: one is twice the other, and four times at half of the
    temperature."""
    for sampling, want in zip(TWO, (2 / 3, 0.8), strict=True):
        assert (drawn[sampling][:, 0] == 0).mean() == pytest.approx(want, abs=0.05)


def test_a_penalty_moves_scores_down():
    scores = jnp.array([[2.0, -2.0, 1.0]])
    moved = generate.penalised(scores, jnp.array([[True, True, False]]), 2.0)
    assert moved.tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("repetition_penalty", 0),
    ],
)
def test_values_out_of_range(field, value):
    with pytest.raises(Mistake, match=f"{field} is {value}; it must be"):
        generate.check(Sampling(**{field: value}))


@pytest.mark.parametrize(
    ("sampling", "shown", "says"),
    [
        (Sampling(0.7, beams=2), False, "beams=2 and temperature=0.7: beams leave nothing to chan"),
        (Sampling(beams=2), True, "none is shown as it is written; set beams=1"),
        (Sampling(ngrams_of="answers"), False, "ngrams_of='answers'; did you mean 'answer'"),
    ],
)
def test_what_does_not_go_together(sampling, shown, says):
    with pytest.raises(Mistake, match=says):
        generate.speak(None, None, [[1]], sampling, show=print if shown else None)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ngrams_that_would_come_again(size):
    """Against a loop, on texts of two words of three, some of them shorter than an n-gram."""
    rng, lengths = np.random.default_rng(0), np.array([0, 1, 2, 3, 7, 12, 12, 5])
    texts = np.where(np.arange(12) < lengths[:, None], rng.integers(0, 2, (8, 12)), -1)
    texts[-1, :3] = [-1, -1, 3]  # -1: it may be repeated; 3: there is no such word
    run = tiny.hasty(generate.repeating, static_argnums=(2, 3))
    out = np.asarray(run(texts, lengths, size, 3))
    for text, length, found in zip(texts.tolist(), lengths, out, strict=True):
        grams = [text[i : i + size] for i in range(12 - size + 1)]
        last = text[:length][length - size + 1 :] if length >= size - 1 else [-1]
        want = [-1 not in last and [*last, word] in grams for word in range(3)]
        assert found.tolist() == want
    assert out.any()


# --- on a model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(model, params) whose texts do not repeat themselves soon."""
    found = models.find(str(tiny_causal.directory(tmp_path_factory.mktemp("llama"))))
    return found, weights.load(found, jax.random.key(0)).params


def in_haste(*args, **how):
    """A `Generator` whose programs are compiled in haste."""
    hasty = functools.partial(jax.jit, compiler_options=tiny.IN_HASTE)
    with mock.patch.object(jax, "jit", hasty):
        return generate.Generator(*args, **how)


@pytest.fixture(scope="module")
def generator(model):
    model, params = model
    apply = peft.attach((), model).apply
    return in_haste(apply, {"params": params}, model, tokens=9, ends=(2,), burst=4)


PROMPTS = tiny_causal.texts((7, 1, 12), seed=3)


def last(generator, *args, **how):
    *_, texts = ([list(text) for text in texts] for texts in generator(*args, **how))
    return texts


@pytest.fixture(scope="module")
def are_likeliest(model):
    """(params, prompts, texts) -> is each token the likeliest behind those before it, by the model
    without a cache?"""
    apply = tiny.hasty(model[0].module.apply)

    def check(params, prompts, texts):
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        batch = tiny_causal.asked(tiny_causal.packed(whole, 60 - sum(map(len, whole))))
        logits, start = np.asarray(apply({"params": params}, batch))[0], 0
        for prompt, text in zip(prompts, texts, strict=True):
            first = start + len(prompt) - 1
            assert logits[first : first + len(text)].argmax(-1).tolist() == text
            start += len(prompt) + len(text)

    return check


def test_the_likeliest_text(model, generator, are_likeliest):
    texts = last(generator, PROMPTS)
    assert all(len(text) == 9 or text[-1] == 2 for text in texts)
    are_likeliest(model[1], PROMPTS, texts)


def test_an_adapter_for_each_prompt(model, are_likeliest, tmp_path):
    found, params = model
    lora = {"rank": 2, "alpha": 4.0}
    groups = {"attention": lora, "mlp": lora | {"targets": ("up_proj",)}}
    trained = {name: Trained(found, params, {"lora": group}) for name, group in groups.items()}
    read = {
        name: files.read(one.write(tmp_path / name, labels=None), found)
        for name, one in trained.items()
    }
    both = several.attach(read, found, {"params": params})
    generator = in_haste(both.apply, both.variables, found, tokens=9, ends=(2,), burst=9)
    texts = last(generator, PROMPTS, more={"adapters": np.array([[1], [-1], [0]])})
    for row, name in enumerate(("mlp", None, "attention")):
        own = trained[name].merged(params) if name else params
        are_likeliest(own, PROMPTS[row : row + 1], texts[row : row + 1])


def test_a_head_among_several_takes_one_text_a_row(model, tmp_path):
    found, params = model
    trained = Trained(found, params, {"lora": {"rank": 2, "targets": ("lm_head",)}})
    read = files.read(trained.write(tmp_path, labels=None), found)
    both = several.attach({"mine": read}, found, {"params": params})
    with pytest.raises(Mistake, match="adapters that move head, .* with one text a row alone"):
        both.apply(both.variables, {"adapters": np.zeros((1, 2), int)})


def test_an_embedding_of_its_own_for_each_token():
    """LoRA on a table that is scaled, as Gemma's is; -1: of no adapter."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 3)), rng.normal(size=(2, 3, 4))
    ids, which = np.array([[5, 0, 6]]), np.array([[1, 0, -1]])
    update = tiny.hasty(several._update, static_argnums=0)
    ours = update(layers.Embed(7, 4, scale=2.0), ids, jnp.array(a), jnp.array(b), which)
    want = [2 * a[1, 5] @ b[1], 2 * a[0, 0] @ b[0], np.zeros(4)]
    np.testing.assert_allclose(ours[0], want, rtol=1e-5, atol=1e-6)


def test_one_that_is_over_stays_and_the_others_go_on(generator):
    want, seen = last(generator, PROMPTS), []

    def over(texts):
        seen.append([len(text) for text in texts])
        return [False, len(texts[1]) >= 4, False]

    texts = last(generator, PROMPTS, over=over)
    assert texts == [want[0], want[1][:4], want[2]]
    assert seen[0] == [4, 4, 4]


def test_a_seed_is_a_text(generator):
    """A row's is the seed and its number: it matters not what the other rows are."""
    how = Sampling(temperature=1.0, top_k=20)
    one, other, again = (last(generator, PROMPTS, how, seed=seed) for seed in (0, 1, 0))
    assert one == again
    assert all(text != changed for text, changed in zip(one, other, strict=True))
    moved = last(generator, [*PROMPTS[1:], PROMPTS[0]], how, seed=1)
    assert moved[:2] == one[1:]
    assert last(generator, PROMPTS, how, seed=-1)[1] != one[1]


def test_no_room(generator):
    with pytest.raises(Mistake, match="a prompt of 60 tokens and 9 new ones are more than the 64"):
        last(generator, [[3] * 60])
    with pytest.raises(Mistake, match="a prompt is empty"):
        last(generator, [[3], []])


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(chr(ord("a") + i) for i in ids)


def scripted(steps):
    """A generator that makes the given texts, and stops at those that are over."""

    def run(prompts, sampling, over):
        for texts in steps:
            lists = [[ord(letter) - ord("a") for letter in text] for text in texts]
            ended = all(over(lists))
            yield lists
            if ended:
                return

    return run


def test_stop_strings_and_what_is_shown():
    """`ne` may become `nest`, and is held back until it does not."""
    shown = []
    texts = generate.speak(
        scripted([["an", "n"], ["anne", "ne"], ["annette", "nes"], ["annettex", "nestor"]]),
        Letters(),
        [[1], [1]],
        stops=("nest", "tex"),
        show=lambda row, text: shown.append((row, text)),
    )
    assert texts == ["annet", ""]
    assert "".join(text for row, text in shown if row == 0) == "annet"
    assert [text for row, text in shown if row == 1] == []
