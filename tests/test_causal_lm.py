"""Language modelling and preferences on a toy: the loss is that of a bigram table."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_chat import CHATML, tokenizer

from bmft import evaluate, models, prepare, sharding, tasks
from bmft.data.batches import Batches
from bmft.data.dialogs import Dialogs, Turn
from bmft.data.text import Encoded
from bmft.errors import Mistake
from bmft.tasks import causal_lm, preference
from configs import base

V, N, T, K = 11, 9, 40, 3


def examples(pairs=False):
    """N random examples; the last of one token, that is learned but cannot be predicted."""
    rng = np.random.default_rng(0)
    lengths = np.array([*rng.integers(5, 13, N - 1), 5 if pairs else 1])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = rng.random(offsets[-1]) < 0.6
    second = rng.integers(2, lengths - 1) if pairs else None
    tokens = rng.integers(0, V, offsets[-1]).astype(np.int32)
    return Encoded(tokens, np.zeros(len(tokens), np.uint8), offsets, 0, mask, second)


def table(seed=1):
    return np.random.default_rng(seed).normal(0, 1, (V, V)).astype(np.float32)


def apply(variables, batch, *, train=False, key=None, adapter=True, seen=None):
    """A model as the contract has it: -log p(target | token), 0 where there is no target.

    What stands where nothing is predicted must not count, so it is not a number here."""
    weights = variables["params"] + (variables["peft"] if adapter else 0.0)
    log_p = jax.nn.log_softmax(weights)[batch["input_ids"]]
    if "smoothing" in batch:
        share = batch["smoothing"]
        log_p = (1 - share) * log_p + share * log_p.mean(-1, keepdims=True)
    log_p = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return jnp.where(batch["targets"] >= 0, -log_p, jnp.nan if train else 0.0)


def forward(variables):
    return lambda batch, *, train, adapter=True: apply(
        variables, batch, train=train, adapter=adapter
    )


def likelihoods(encoded, weights):
    """[(log-likelihood, tokens) of each sequence] one by one, in numpy."""
    log_p = weights - np.log(np.exp(weights.astype(np.float64)).sum(-1, keepdims=True))
    found = []
    for i, (start, end) in enumerate(itertools.pairwise(encoded.offsets)):
        cuts = [start, end]
        if encoded.second is not None:
            cuts.insert(1, start + encoded.second[i])
        for a, b in itertools.pairwise(cuts):
            at = [t for t in range(a + 1, b) if encoded.learned[t]]
            before = [encoded.tokens[t - 1] for t in at]
            found.append((log_p[before, encoded.tokens[at]].sum(), len(at)))
    return np.array(found)


def batches(encoded, **changes):
    settings = {"batch_size": 4, "row_length": T, "seed": 0, "shuffle": True} | changes
    return Batches(encoded, **settings)


def test_the_loss_is_the_mean_over_learned_tokens():
    encoded, task = examples(), causal_lm.make({})
    variables = {"params": table(), "peft": table(2)}
    expected = likelihoods(encoded, table() + table(2))
    of_batch = tiny.hasty(lambda variables, batch: task.loss(forward(variables), batch, None))
    sums = [jax.tree.leaves(of_batch(variables, batch)) for batch in batches(encoded)]
    assert len(sums) == 3
    total, weight, seen = np.sum(sums, 0)
    assert (weight, seen) == (expected[:, 1].sum(), N)
    assert total == pytest.approx(-expected[:, 0].sum(), rel=1e-5)


def test_the_loss_of_training_alone_is_smoothed():
    encoded, task = examples(), causal_lm.make({}, label_smoothing=0.2)
    bound = forward({"params": table(), "peft": table(2)})
    both = jax.jit(lambda batch: (task.loss(bound, batch, None), task.outputs(bound, batch)))
    found = [both(batch) for batch in batches(encoded, shuffle=False)]
    plain = likelihoods(encoded, table() + table(2))[:, 0].sum()
    weights, even = (table() + table(2)).astype(np.float64), 0.0
    log_p = weights - np.log(np.exp(weights).sum(-1, keepdims=True))
    for start, end in itertools.pairwise(encoded.offsets):
        at = np.flatnonzero(encoded.learned[start + 1 : end]) + start
        even += log_p[encoded.tokens[at]].mean(-1).sum()
    total = sum(float(loss[0][0]) for loss, _ in found)
    assert total == pytest.approx(-(0.8 * plain + 0.2 * even), rel=1e-5)
    assert sum(out["nll"].sum() for _, out in found) == pytest.approx(-plain, rel=1e-5)


def test_evaluation_is_by_example_and_its_means_by_token():
    encoded, task = examples(), causal_lm.make({})
    outputs_of = evaluate.make_outputs(apply, task.outputs)
    variables = {"params": table(), "peft": table(2)}
    outputs = evaluate.over_split(outputs_of, variables, batches(encoded, shuffle=False))
    expected = likelihoods(encoded, table() + table(2))
    assert np.array_equal(outputs["tokens"], expected[:, 1])
    np.testing.assert_allclose(outputs["nll"], -expected[:, 0], rtol=1e-5, atol=1e-6)
    found = task.metrics(outputs, task.targets(None))
    mean = -expected[:, 0].sum() / expected[:, 1].sum()
    assert found == pytest.approx({"loss": mean, "perplexity": np.exp(mean)}, rel=1e-5)
    assert found.keys() == task.directions.keys()
    decoded = task.decode({name: values[:2] for name, values in outputs.items()})
    assert decoded[1]["loss"] == pytest.approx(-expected[1, 0] / expected[1, 1], rel=1e-5)
    assert causal_lm.metrics(np.array([1e6]), np.array([1])) == {"loss": 1e6, "perplexity": np.inf}


def formulas(chosen, rejected, base_chosen, base_rejected, counts, method):
    """The papers' losses in float64, with beta 0.3, gamma 0.7 and, of DPO, smoothing 0.1."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    (n_chosen, n_rejected), beta = counts, 0.3
    if method == "dpo":
        h = beta * ((chosen - base_chosen) - (rejected - base_rejected))
        return -0.9 * np.log(sigmoid(h)) - 0.1 * np.log(sigmoid(-h)), h
    if method == "ipo":
        h = (chosen - base_chosen) / n_chosen - (rejected - base_rejected) / n_rejected
        return (h - 1 / (2 * beta)) ** 2, beta * h
    h = beta * chosen / n_chosen - beta * rejected / n_rejected
    return -np.log(sigmoid(h - 0.7)), h


@pytest.mark.parametrize("method", preference.METHODS)
def test_preferences_are_the_papers(method):
    encoded = examples(pairs=True)
    encoded.learned[:] = True
    smoothing = 0.1 if method == "dpo" else 0.0
    task = preference.make({}, method=method, beta=0.3, gamma=0.7, smoothing=smoothing)
    policy, base = (likelihoods(encoded, w) for w in (table() + table(2), table()))
    sides = (policy[0::2, 0], policy[1::2, 0], base[0::2, 0], base[1::2, 0])
    cost, margin = formulas(*sides, (policy[0::2, 1], policy[1::2, 1]), method)

    @tiny.hasty
    def both(adapter, batch):
        bound = forward({"params": table(), "peft": adapter})
        return task.loss(bound, batch, None), task.outputs(bound, batch)

    (batch,) = batches(encoded, batch_size=N)
    order = np.argsort(batch["index"], axis=None)[-N:]  # behind the empty slots
    ((total, weight), aux), outputs = jax.device_get(both(table(2), batch))
    outputs = {name: values.ravel()[order] for name, values in outputs.items()}
    for name, expected in (("cost", cost), ("margin", margin), ("chosen", sides[0])):
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-4, atol=1e-5)
    assert ("reference_rejected" in outputs) == (method != "simpo")
    assert (weight, aux["accuracy"], aux["examples"]) == (N, (margin > 0).sum(), N)
    assert total == pytest.approx(cost.sum(), rel=1e-4)

    found = task.metrics(outputs, None)
    means = {"loss": cost.mean(), "margin": margin.mean(), "accuracy": (margin > 0).mean()}
    means |= {"chosen": sides[0].mean(), "rejected": sides[1].mean()}
    assert found == pytest.approx(means, rel=1e-4)
    assert found.keys() == task.directions.keys()
    assert task.decode(outputs)[3]["margin"] == pytest.approx(margin[3], rel=1e-4)
    if method != "simpo":  # before the first step no answer is preferred
        ((total, weight), aux), outputs = both(np.zeros((V, V), np.float32), batch)
        assert abs(outputs["margin"]).max() < 1e-6
        assert total / N == pytest.approx(np.log(2) if method == "dpo" else (1 / 0.6) ** 2)


def test_the_gradient_of_dpo_is_the_papers():
    """-beta s(-h) (grad log p(chosen) - grad log p(rejected)): the reference stands still."""
    (batch,) = batches(examples(pairs=True), batch_size=N)
    task = preference.make({}, beta=0.3)

    def total(adapter, base, batch):
        return task.loss(forward({"params": base, "peft": adapter}), batch, None)[0][0]

    def log_p(adapter, batch):
        bound = forward({"params": table(), "peft": adapter})
        sums = preference.log_likelihoods(bound, batch, False, train=False)
        return sums["chosen"] - sums["rejected"]

    @tiny.hasty
    def gradients(adapter, base, batch):
        now, back = jax.vjp(lambda adapter: log_p(adapter, batch), adapter)
        h = 0.3 * (now - log_p(jnp.zeros_like(adapter), batch))
        (expected,) = back(-0.3 * jax.nn.sigmoid(-h) * batch["weights"])
        return *jax.grad(total, argnums=(0, 1))(adapter, base, batch), expected

    of_adapter, of_base, expected = gradients(table(2), table(), batch)
    np.testing.assert_allclose(of_adapter, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_base, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_batch_in_parts_is_the_whole(pairs):
    """Both sequences of a pair lie in one row, so rows may be computed in any parts."""
    task = preference.make({}) if pairs else causal_lm.make({})
    batch = batches(examples(pairs), rows_multiple=2).at(0)

    @tiny.hasty
    def sums(variables, batch):
        parts = [batch, *({name: a[i::2] for name, a in batch.items()} for i in range(2))]
        return [task.loss(forward(variables), part, None) for part in parts]

    whole, *halves = map(jax.tree.leaves, sums({"params": table(), "peft": table(2)}, batch))
    np.testing.assert_allclose(whole, np.sum(halves, 0), rtol=1e-5)


# --- the tasks and their tables --------------------------------------------------------------

ASKED = (Turn("user", "two?"), Turn("assistant", "2"))


def dialogs(**changes):
    return Dialogs([ASKED, ASKED], **changes)


def test_both_are_found_by_name():
    for name in ("causal_lm", "preference"):
        task = tasks.get(name).make({})
        assert (task.name, task.num_outputs, task.labels) == (name, None, None)
        assert task.metric[0] in task.directions
        assert task.targets(dialogs()) is None


def test_the_style_is_the_formats_unless_told():
    assert causal_lm.style_of(dialogs(format="e2e")) == ("plain", "\n", "all")
    assert causal_lm.style_of(dialogs(format="alpaca")) == ("chat", "\n", "all")
    told = causal_lm.style_of(dialogs(format="alpaca"), "plain", "", "last")
    assert told == ("plain", "", "last")


def test_an_example_is_shown_with_what_is_learned():
    made, task = tokenizer(CHATML), causal_lm.make({"train": dialogs()})
    encoded = task.encode(dialogs(), made, 50)
    shown = task.show(encoded, made)
    assert shown.startswith("4 of 24 tokens are learned (16.7%); the first example")
    assert shown.endswith("<|im_start|>assistant\n⟦2<|im_end|>⟧")
    bare = tokenizer(CHATML, pad_token=None)
    assert "the tokenizer of tiny has no pad token: none is needed" in task.show(encoded, bare)
    pairs = dialogs(rejected=["3", "short"])
    task = preference.make({"train": pairs})
    shown = task.show(task.encode(pairs, made, 50), made)
    assert "⟦2<|im_end|>⟧" in shown
    assert "⟦3<|im_end|>⟧" in shown


def test_prompts_and_measures():
    """A meaning has its references together; what it is measured by, its format says."""
    turns = [(Turn("user", "two?"), Turn("assistant", word)) for word in ("2", "yes")]
    table = Dialogs([*turns, (Turn("assistant", "text"),)], format="e2e")
    task, made = causal_lm.make({"train": table}), tokenizer()
    ((ids, references),) = task.prompts(table, made)
    assert (made.decode(ids), references) == ("<s>two?\n", ["2", "yes"])
    assert task.measure(["yes"], [references])["rouge_l"] == 100
    assert causal_lm.make({"train": dialogs()}).measure is None
    told = causal_lm.make({}, measures=("exact_match",), pattern="[a-z]+")
    assert told.measure(["5 yes"], [references]) == {"exact_match": 1}
    with pytest.raises(
        Mistake, match="'two\\?': task.template=plain has one prompt and one answer"
    ):
        task.prompts(Dialogs([(Turn("system", "short"), *ASKED)], format="e2e"), made)


def test_batches_of_a_run_and_what_is_printed(monkeypatch, capsys):
    config = base.get_config()
    config.data.max_length, config.train.batch_size = 14, 4
    asked = (Turn("user", "two? " * 8), Turn("assistant", "2"))
    table = Dialogs([ASKED] * 5 + [asked] * 2, notes=("format messages",))
    task, made = causal_lm.make({"train": table}), tokenizer(CHATML)
    monkeypatch.setattr(models, "tokenizer", lambda model: made)
    model = SimpleNamespace(name="toy", config=SimpleNamespace(max_length=20, vocabulary=99))
    mesh = sharding.mesh(config)
    found = prepare.batches(config, model, (), task, {"train": table}, mesh)["train"]
    assert (found.examples, found.steps_per_epoch) == (5, 2)
    batch = found.at(0)
    assert (batch["targets"] >= 0).sum() == 4 * 2
    printed = capsys.readouterr().out
    left = "2 left out, as the cut leaves nothing to learn (the first: examples row 5)"
    assert printed.startswith(f"train: 7 examples; format messages; {left}\n")
    assert printed.endswith("<|im_start|>assistant\n⟦2<|im_end|>⟧\n")


WRONG = {
    "measure": (causal_lm, {"measures": ("blue",)}, "no measure 'blue'; did you mean 'bleu'"),
    "template": (causal_lm, {"template": "chatml"}, "task.template='chatml'; did you mean 'chat'"),
    "separator": (causal_lm, {"separator": " "}, "task.separator=' ' is not read with task.templ"),
    "smoothed": (causal_lm, {"label_smoothing": 1.0}, r"label_smoothing=1.0 is not in \[0, 1\)"),
    "answers": (causal_lm, {"answers": "first"}, "task.answers='first'; known: all, last"),
    "no pairs": (preference, {}, "examples holds no preference pairs"),
    "method": (preference, {"method": "ppo"}, "task.method='ppo'; did you mean"),
    "beta": (preference, {"beta": 0.0}, "task.beta=0.0: needs a number above 0"),
    "gamma": (preference, {"gamma": -1.0}, "task.gamma=-1.0: needs a number of at least 0"),
    "smoothing": (preference, {"smoothing": 0.5}, "task.smoothing=0.5: needs a share below 0.5"),
    "smooth ipo": (preference, {"smoothing": 0.1, "method": "ipo"}, "below 0.5, and method dpo"),
}


@pytest.mark.parametrize(("task", "keys", "message"), WRONG.values(), ids=WRONG)
def test_wrong_keys(task, keys, message):
    with pytest.raises(Mistake, match=message):
        task.make({"train": dialogs()}, **keys)


def test_how_a_cpu_is_to_compile_a_language_model():
    config = base.get_config()
    assert prepare._compiled(config, mesh := sharding.mesh(config)) is None
    config.task.name = "causal_lm"
    assert prepare._compiled(config, mesh) == {"xla_cpu_prefer_vector_width": 512}
    assert prepare._known("xla_of_no_such_name", 1, mesh) is None


def test_the_reference_must_not_move():
    check = preference.make({}).check_moving
    check(["peft/layers/query/lora_a", "peft_shared/x"])
    with pytest.raises(Mistake, match=r"but params/head/bias and 1 more of the base itself moves"):
        check(["peft/a", "params/layers/bias", "params/head/bias"])
    assert preference.make({}, method="simpo").check_moving is None
