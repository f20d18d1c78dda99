"""Bottleneck adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020
(arXiv:2005.00247), and the scaled parallel adapter of He et al. 2021 (arXiv:2110.04366).

    adapter(x) = up(nonlinearity(down(x)))        d -> d / reduction -> d

    houlsby   h + adapter(h) after attention and after the MLP, before the residual sum; the
              original also moves the layer norms
    pfeiffer  h + adapter(norm(h + stream)) after the MLP only, before the residual sum
    parallel  mlp(x) + scaling * adapter(x), beside the MLP

with h the output of the block's part. Only parallel starts exactly as the base (its up is zero);
the others start near it.

    peft/<module>/adapter_{down,up}_{kernel,bias}    [l, d, m], [l, m], [l, m, d], [l, d]
    peft_const/<module>/adapter_on                   [l], 0 in layers left out; if there are any
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, peft
from bmft.errors import Mistake, nearest


class Kind(NamedTuple):
    """Defaults of a kind, as published."""

    modules: tuple  # module paths that it wraps
    reduction: int
    nonlinearity: str
    init: str
    scaling: float
    norms: bool  # the base's layer norms move too
    identity: float  # see bmft.peft.Method


BOTH, AFTER_MLP = ("layers/attention_norm", "layers/mlp_norm"), ("layers/mlp_norm",)
KINDS = {
    "houlsby": Kind(BOTH, 16, "gelu", "houlsby", 1.0, True, 0.3),
    "pfeiffer": Kind(AFTER_MLP, 16, "relu", "bert", 1.0, False, 0.3),
    "parallel": Kind(("layers/mlp",), 2, "relu", "mam_adapter", 4.0, False, 0.0),
}


def _truncated(key, shape, dtype):
    """Houlsby's: normal of std 1e-2 cut at two of them."""
    return 1e-2 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


def _kaiming(key, shape, dtype):
    bound = shape[0] ** -0.5  # torch's kaiming with a = sqrt 5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


ZEROS = jax.nn.initializers.zeros
AXES = {"adapter_down_kernel": "d.", "adapter_down_bias": "."}  # see bmft.peft.Method
AXES |= {"adapter_up_kernel": ".d", "adapter_up_bias": "d"}
# name -> (down, up)
INITS = {
    "houlsby": (_truncated, _truncated),
    "bert": (jax.nn.initializers.normal(0.02), jax.nn.initializers.normal(0.02)),
    "mam_adapter": (_kaiming, ZEROS),
}


def make(
    model,
    *,
    kind: str = "houlsby",
    reduction: int | None = None,
    nonlinearity: str | None = None,
    init: str | None = None,
    scaling: float | None = None,
    norms: bool | None = None,
    leave_out: tuple[int, ...] = (),
):
    """kind: houlsby, pfeiffer, parallel; leave_out: layers without an adapter. The rest overrides
    the kind's published settings."""
    chosen = settled(
        kind,
        reduction=reduction,
        nonlinearity=nonlinearity,
        init=init,
        scaling=scaling,
        norms=norms,
    )
    check_places(model, chosen.modules, "adapter", f"a {kind} adapter")
    on = _layers(model, leave_out)
    wrap = {"houlsby": houlsby, "pfeiffer": _pfeiffer, "parallel": _parallel}[kind]

    def hook(module, call, *args):
        if peft.path_of(module) not in chosen.modules:
            return call(*args)
        return wrap(lambda x: _adapter(module, x, chosen), call, *args)

    def moves(path):
        return "adapter" if _is_own(path) or (chosen.norms and is_norm(path)) else None

    return peft.Method(
        "adapter",
        moves,
        hook,
        constants={path: {"adapter_on": on} for path in chosen.modules} if leave_out else None,
        rows=(lambda path: on > 0 if _is_own(path) else None) if leave_out else None,
        axes=AXES,
        undecayed=("adapter_down_bias", "adapter_up_bias"),
        identity=chosen.identity,
    )


def settled(kind, **given):
    """The `Kind` of a name, with the settings that are given and not None in place of its own;
    Mistake for a name or a setting that there is not."""
    if kind not in KINDS:
        raise Mistake(f"peft.adapter.kind: no {kind!r}; {nearest(kind, KINDS)}")
    chosen = KINDS[kind]._replace(**{key: v for key, v in given.items() if v is not None})
    _check(chosen)
    return chosen._replace(identity=0.0) if chosen.init == "mam_adapter" else chosen


def _layers(model, leave_out):
    """float32 [l]: 1 where there is an adapter, 0 in the layers left out."""
    on = np.ones(model.names.layers, np.float32)
    for layer in leave_out:
        if not 0 <= layer < len(on):
            raise Mistake(f"peft.adapter.leave_out: no layer {layer}; there are 0 to {len(on) - 1}")
        on[layer] = 0
    if not on.any():
        raise Mistake("peft.adapter.leave_out: no layer is left")
    return on


def _is_own(path):
    return path.startswith("peft/") and "/adapter_" in path


def is_norm(path):
    """Is the leaf at a path one of the base's layer norms?"""
    return path.startswith("params/") and path.rpartition("/")[0].endswith("norm")


def check_places(model, modules, method, what):
    """Refuses a model without one of the module paths `modules`, which `what` wraps."""
    known = model.names.modules("norm", "dense")
    for path in modules:
        if not any(name == path or name.startswith(path + "/") for name in known):
            raise Mistake(f"peft.{method}: {model.name} has no {path} for {what}")


def houlsby(adapter, call, h, stream):
    """The call of a `Residual` or `PreNorm` with h + adapter(h) for h."""
    return call(h + adapter(h), stream)


def _pfeiffer(adapter, call, h, stream):
    return call(h + adapter(call(h, stream)), stream)


def _parallel(adapter, call, x):
    return call(x) + adapter(x)


def _adapter(module, x, chosen):
    """scaling * up(nonlinearity(down(x))) of x [..., d], in float32; returns x's dtype."""
    d, (down_init, up_init) = x.shape[-1], INITS[chosen.init]
    m = max(1, d // chosen.reduction)
    down = peft.leaf(module, "adapter_down_kernel", down_init, (d, m))
    down_bias = peft.leaf(module, "adapter_down_bias", ZEROS, (m,))
    up = peft.leaf(module, "adapter_up_kernel", up_init, (m, d))
    up_bias = peft.leaf(module, "adapter_up_bias", ZEROS, (d,))
    h = layers.ACTIVATIONS[chosen.nonlinearity](x.astype(jnp.float32) @ down + down_bias)
    update = chosen.scaling * (h @ up + up_bias)
    if module.has_variable("peft_const", "adapter_on"):
        update *= module.get_variable("peft_const", "adapter_on")
    return update.astype(x.dtype)


def _check(chosen):
    if chosen.reduction < 1:
        raise Mistake(f"peft.adapter.reduction is {chosen.reduction}; it must be 1 or more")
    for key, known in (("nonlinearity", layers.ACTIVATIONS), ("init", INITS)):
        if getattr(chosen, key) not in known:
            value = getattr(chosen, key)
            raise Mistake(f"peft.adapter.{key}: no {value!r}; {nearest(value, known)}")
