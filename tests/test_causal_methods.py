"""Methods on causal language models: what tests/test_methods.py asks of them on encoders."""

import jax
import numpy as np
import pytest
import tiny
import tiny_causal

from bmft import models, peft, tree
from bmft.errors import Mistake
from bmft.models import weights

TEXTS = tiny_causal.texts((9, 3, 6))
LORA = {"rank": 3, "alpha": 7.0}
# (family, {method: its group}); between them all taps and kinds of modules.
CASES = [
    (
        "llama",
        {
            "lora": LORA | {"targets": ("q_proj", "gate_proj", "lm_head")},
            "prompt_tuning": {"tokens": 2},
        },
    ),
    ("llama", {"adapter": {"kind": "houlsby"}, "prefix_tuning": {"tokens": 2}}),
    ("gpt2", {"lora": LORA | {"targets": ("c_attn", "mlp.c_proj")}}),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (model, params, loss(params, batch) without methods)}"""
    found = {}
    for name in ("llama", "gpt2"):
        model = models.find(str(tiny_causal.directory(tmp_path_factory.mktemp(name), name)))
        params = weights.load(model, jax.random.key(0)).params
        plain = tiny.hasty(lambda p, b, model=model: model.module.apply({"params": p}, b))
        found[name] = model, params, plain
    return found


@pytest.mark.parametrize(("family", "groups"), CASES, ids=[f"{f}-{'+'.join(g)}" for f, g in CASES])
def test_methods(bases, family, groups):
    model, params, plain = bases[family]
    methods = peft.build(model, tuple(groups), groups)
    add, apply = peft.attach(methods, model)
    base = {"params": params}
    variables = base | tiny.hasty(add)(jax.random.key(1), base)
    paths = [path for path in tree.flatten(variables) if peft.may_move(path)]
    claims = peft.claims(methods, paths, heads=model.heads)
    moving, frozen = tree.split(variables, claims.__contains__)
    virtual = peft.virtual_ids(methods, model)
    batch = tiny_causal.packed(TEXTS, virtual=virtual)
    learned = (batch["targets"] >= 0).sum()

    def objective(moving, frozen):  # which, closed over, XLA would fold for seconds
        each = apply(tree.join(moving, frozen), batch)
        return each.sum() / learned, each

    gradient, losses = tiny.hasty(jax.value_and_grad(objective, has_aux=True)), []
    for step in range(3):
        (loss, each), grads = gradient(moving, frozen)
        if step == 0:
            unchanged = plain(params, tiny_causal.packed(TEXTS))
            still = {path for path, grad in tree.flatten(grads).items() if not np.any(grad)}
            # What B multiplies is zero at the start, and with it the slope of A (of E likewise).
            assert all(path.endswith(("lora_a", "lora_b")) for path in still), still
            if max(method.identity for method in methods) == 0:
                np.testing.assert_allclose(each, unchanged, atol=1e-5)
        losses.append(float(loss))
        moving = jax.tree.map(lambda leaf, grad: leaf - 0.02 * grad, moving, grads)
    assert losses[2] < losses[0]
    (_, each), grads = gradient(moving, frozen)
    assert all(np.any(grad) for grad in jax.tree.leaves(grads))
    if family == "gpt2":  # LoRA alone, on the fused layer, too
        merged = peft.merge(methods, params, peft.added(moving, frozen))
        np.testing.assert_allclose(each, plain(merged, batch), atol=1e-5)
        assert np.abs(each - unchanged).max() > 1e-3
    if virtual:  # the base alone gives what it gave: DPO's reference
        base = tiny.hasty(apply, static_argnames=("adapter",))
        alone = base(tree.join(moving, frozen), batch, adapter=False)
        for one, other in zip(_rows(alone, len(virtual)), _rows(unchanged, 0), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def _rows(each, virtual):
    start = 0
    for ids in TEXTS:
        yield each[0, start + virtual : start + virtual + len(ids)]
        start += virtual + len(ids)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_of_two_that_are_tied_is_not_merged(bases, target):
    model, params, _ = bases["llama"]
    methods = peft.build(model, ("lora",), {"lora": LORA | {"targets": (target,)}})
    variables = peft.constants(methods)
    with pytest.raises(Mistake, match="one table"):
        peft.merge(methods, params, variables | {"peft": {}})


def test_what_all_linear_means(bases):
    """Not the head, tied or not; and a tied head is nothing that a method may read or save."""
    model = bases["llama"][0]
    sites = peft.build(model, ("lora",), {"lora": {"targets": ("all-linear",)}})[0].files.sites
    attention = [f"layers/attention/{name}" for name in ("query", "key", "value", "output")]
    mlp = [f"layers/mlp/{name}" for name in ("gate", "up", "down")]
    assert sorted(sites) == sorted(attention + mlp)
    for method, group in (("oft", {"targets": ("lm_head",)}), ("dora", {"targets": ("lm_head",)})):
        with pytest.raises(Mistake, match="lm_head|another kind"):
            peft.build(model, (method,), {method: group})
    with pytest.raises(Mistake, match="matches no module"):
        peft.build(model, ("lora",), {"lora": {"modules_to_save": ("lm_head",)}})


REFUSED = [
    ("llama", "bitfit", {}, "has no such biases"),
    ("llama", "token_rows", {"tokens": (3,)}, "is the table of its word embedding"),
    ("gpt2", "lora", {}, "did you mean 'query_key_value'"),
]


@pytest.mark.parametrize(("family", "method", "group", "says"), REFUSED)
def test_what_is_refused(bases, family, method, group, says):
    with pytest.raises(Mistake) as refused:
        peft.build(bases[family][0], (method,), {method: group})
    assert says in str(refused.value)
