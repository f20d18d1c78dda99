"""Several adapters of one base in memory: each example of a batch is computed with its own.

    several = attach({"tweets": one, "reviews": other}, model, loaded.variables())
    apply = jax.jit(several.apply)
    apply(several.variables, several.choose(batch, "tweets"))
    apply(several.variables, batch | {"adapters": [[0, 1, -1], [1, 1, 0]]})     int32 [b, e]

`adapters` says for each example, by its number in `several.names`, whose it is; -1 is the base
alone, with the head that `variables` came with. It is data: switching compiles nothing. In packed
rows each token takes its example's; of images, where a row is an example, it is [b].

LoRA and IA3 adapters, also mixed, and dense layers that any of them trained whole (heads, poolers,
biases). n adapters, stacked behind the layers; ranks are filled up with zeros to the largest, r:

    peft/<module>/lora_a [l, n, in, r]        scales are in it      lora_b [l, n, r, out]
    peft/<module>/ia3_in [l, n + 1, in]       ia3_out [l, n + 1, out]; the last is the base's
    peft/<module>/kernel [l, n + 1, in, out]  bias [l, n + 1, out]: trained whole
    peft/<module>/shift [l, n + 1, out]       of the bias, where the kernel stays the base's

LoRA's cost is that of one adapter of rank n r: every token meets every A, and all but its own are
masked before B. That is two plain products, and no matrix is gathered for each token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import convolution

OWN = ("lora_a", "lora_b", "ia3_in", "ia3_out")


class Several(NamedTuple):
    names: tuple
    labels: dict  # {name: of the head, or None}
    variables: Any  # the base's, and all adapters'
    apply: Callable  # (variables, batch with "adapters") -> outputs, without dropout

    def index(self, name):
        """The number of an adapter; -1 for None, the base."""
        if name is not None and name not in self.names:
            raise Mistake(f"no adapter {name!r}; {nearest(name, self.names)}")
        return -1 if name is None else self.names.index(name)

    def choose(self, batch, name):
        """The batch, all of it for one adapter; None: for the base alone."""
        if "first" in batch:
            shape = batch["first"].shape
        elif "segments" in batch:  # a language model's has no slots of examples
            shape = len(batch["segments"]), max(int(np.max(batch["segments"])), 1)
        else:
            shape = batch["images"].shape[:1]
        return batch | {"adapters": np.full(shape, self.index(name), np.int32)}


def attach(adapters, model, base):
    """`Several` of {name: files.Adapter} on base, `Loaded.variables()`.

    Raises Mistake, naming adapter and leaf, for methods other than LoRA and IA3, for leaves other
    than a dense layer's that were trained whole, and for heads of different shapes.
    """
    if not adapters:
        raise Mistake("no adapters to attach")
    flat, stacks = tree.flatten(base["params"]), {}
    dense = model.names.modules("dense")
    for name, one in adapters.items():
        for path, leaf in sorted(one.leaves.items()):
            collection, _, where = path.partition("/")
            module, _, kind = where.rpartition("/")
            if collection == "params" and module in dense:
                _check_whole(name, where, leaf, flat.get(where))
            elif collection != "peft" or kind not in OWN or not {"lora", "ia3"} & {*one.names}:
                methods = " + ".join(one.names)
                raise Mistake(
                    f"adapter {name!r} ({methods}) moves {path}: LoRA, IA3 and whole dense layers "
                    "can stand beside others; merge it, or convert it to LoRA"
                )
            stacks.setdefault(module, set()).add(kind)
    made = {}
    for module, kinds in stacks.items():
        values, at = list(adapters.values()), 1 if module.startswith("layers/") else 0
        if "lora_a" in kinds:
            a, b = _lora(values, module)
            made[f"{module}/lora_a"], made[f"{module}/lora_b"] = np.stack(a, at), np.stack(b, at)
        for kind in sorted(kinds & {"ia3_in", "ia3_out"}):
            found = [one.leaves.get(f"peft/{module}/{kind}") for one in values]
            some = next(leaf for leaf in found if leaf is not None)
            ones = np.ones_like(some)
            found = [ones if leaf is None else leaf for leaf in [*found, None]]
            made[f"{module}/{kind}"] = np.stack(found, at)
        made |= _whole(values, module, kinds, flat, at)
    method = peft.Method("several", lambda path: None, _hook)
    inner = peft.attach((method,), model).apply
    head = model.names.head_module

    def apply(variables, batch):
        if head in stacks and np.shape(batch.get("adapters", ()))[1:] > (1,):
            raise Mistake(
                f"adapters that move {head}, of a language model, can stand beside others with one "
                "text a row alone: whose a token is, is not known there"
            )
        own = {"peft_shared": {"several": _which(batch)}}
        return inner(variables | own, {k: v for k, v in batch.items() if k != "adapters"})

    own = {"peft": tree.unflatten({path: jnp.asarray(leaf) for path, leaf in made.items()})}
    labels = {name: one.labels for name, one in adapters.items()}
    return Several(tuple(adapters), labels, base | own, apply)


def _check_whole(name, path, leaf, own):
    if own is None:
        raise Mistake(f"adapter {name!r} has {path} whole, which this base has quantized")
    if leaf.shape != own.shape:
        raise Mistake(
            f"adapter {name!r} has {path} of shape {list(leaf.shape)}, the model has "
            f"{list(own.shape)}: heads can stand side by side if their shapes are equal"
        )


# --- one stack of each leaf ------------------------------------------------------------------


def _lora(adapters, module):
    """A, the scale in it, and B of each adapter at a module, of one rank."""
    found = []
    for one in adapters:
        a, b = (one.leaves.get(f"peft/{module}/{name}") for name in ("lora_a", "lora_b"))
        if a is not None:
            constants = tree.flatten(peft.constants(one.methods))
            scale = np.asarray(constants[f"peft_const/{module}/lora_scale"])
            sides = (1,) * (a.ndim - scale.ndim)
            a = a * scale.reshape(*scale.shape[:-1], *sides, scale.shape[-1])
        found.append(None if a is None else (a, b))
    have = [pair for pair in found if pair is not None]
    groups = {a.shape[-1] // b.shape[-2] for a, b in have}
    shapes = {(a.shape[:-1], b.shape[-1]) for a, b in have}
    if len(groups) > 1 or len(shapes) > 1:
        raise Mistake(f"updates of {module} differ in shape; are the adapters of one base?")
    most = max(b.shape[-2] for _, b in have)
    padded = [pair and _padded(*pair, most) for pair in found]
    none = tuple(np.zeros_like(leaf) for leaf in next(pair for pair in padded if pair))
    return zip(*(pair or none for pair in padded), strict=True)


def _padded(a, b, most):
    """A [..., in, g k] and B [..., k, out] with k filled up to `most` in each of g groups."""
    k = b.shape[-2]
    a = a.reshape(*a.shape[:-1], -1, k)
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, most - k)])
    b = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, most - k), (0, 0)])
    return a.reshape(*a.shape[:-2], -1), b


def _whole(adapters, module, kinds, flat, at):
    """{path: stack} of a dense layer that some adapters hold whole, the base's last."""

    def stack(kind):
        path, found = f"{module}/{kind}", []
        base = np.asarray(flat[path], np.float32)
        for one in adapters:
            leaf, mask = (kept.get(f"params/{path}") for kept in (one.leaves, one.rows))
            if leaf is not None and mask is not None:
                leaf = np.where(mask.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, base)
            found.append(base if leaf is None else leaf)
        return np.stack([*found, base], at)

    has_bias = f"{module}/bias" in flat
    if "kernel" in kinds:
        return {f"{module}/{kind}": stack(kind) for kind in ("kernel", "bias")[: 1 + has_bias]}
    if "bias" in kinds:
        biases = stack("bias")
        return {f"{module}/shift": biases - np.take(biases, [-1], at)}
    return {}


# --- in the model ----------------------------------------------------------------------------


def _which(batch):
    """{"tokens": [b, t], "examples": [b, e]}: numbers of adapters; of images both are [b]."""
    if "adapters" not in batch:
        raise Mistake("the batch has no 'adapters': which adapter each example takes")
    examples = jnp.asarray(batch["adapters"], jnp.int32)
    if "segments" not in batch:
        return {"tokens": examples, "examples": examples}
    slots = jnp.maximum(batch["segments"] - 1, 0)  # padding is 0, and of no matter
    return {"tokens": jnp.take_along_axis(examples, slots, axis=1), "examples": examples}


def _hook(module, call, *args):
    path = peft.path_of(module)
    own = {
        name: module.get_variable("peft", name)
        for name in (*OWN, "kernel", "bias", "shift")
        if module.has_variable("peft", name)
    }
    if not own:
        return call(*args)
    inside = path.startswith(("layers/", "embeddings/"))
    which = peft.shared("several")["tokens" if inside else "examples"]
    x = args[0]
    if "ia3_in" in own:
        x = _scaled(x, own["ia3_in"], which)
    out = _replaced(module, x, own, which) if "kernel" in own else call(x, *args[1:])
    if "shift" in own:
        out = out + _row(own["shift"], which, out.ndim).astype(out.dtype)
    if "lora_a" in own:
        out = out + _update(module, x, own["lora_a"], own["lora_b"], which).astype(out.dtype)
    return _scaled(out, own["ia3_out"], which) if "ia3_out" in own else out


def _row(table, which, ndim):
    """Rows of table [n + 1, d] by which [...], -1 the last; axes of length 1 put in before d."""
    rows = table[jnp.where(which < 0, len(table) - 1, which)]
    return rows.reshape(*which.shape, *[1] * (ndim - 1 - which.ndim), -1)


def _scaled(x, table, which):
    return (x.astype(jnp.float32) * _row(table, which, x.ndim)).astype(x.dtype)


def _update(module, x, a, b, which):
    """LoRA's update of x [..., in], or ids [b, t], by stacks A [n, ..., in, r] and B, float32."""
    mine = jax.nn.one_hot(which, len(a))  # -1 is none
    if isinstance(module, layers.Embed):
        h = a.swapaxes(0, 1)[x] * mine[..., None]
        return jnp.einsum("...nr,nro->...o", h, b) * module.scale
    x = x.astype(jnp.float32)
    mine = mine.reshape(*which.shape, *[1] * (x.ndim - 1 - which.ndim), -1)
    if isinstance(module, layers.Conv):
        ones = jnp.ones(a.shape[-1])
        each = jax.vmap(lambda a, b: convolution.update(x, a, b, ones, module), out_axes=-1)(a, b)
        return (each * mine[..., None, :]).sum(-1)
    h = jnp.einsum("...i,nir->...nr", x, a) * mine[..., None]
    return jnp.einsum("...nr,nro->...o", h, b)


def _replaced(module, x, own, which):
    """The output of a dense layer of each example's own."""
    x = x.astype(module.dtype)
    y = jnp.einsum("...i,nio->...no", x, own["kernel"].astype(module.dtype))
    if "bias" in own:
        y = y + own["bias"].astype(module.dtype)
    count = y.shape[-2]
    index = jnp.where(which < 0, count - 1, which)
    index = index.reshape(*which.shape, *[1] * (y.ndim - which.ndim))
    return jnp.take_along_axis(y, index, axis=-2)[..., 0, :]
