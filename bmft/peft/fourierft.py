"""FourierFT (Gao et al. 2024, arXiv:2405.03003): a few entries of the update's spectrum move.

    y = base(x) + x dW,    dW = scaling * Re(ifft2(F)),    F zero but for n entries, the same for
                                                           all modules of one size
Which entries is drawn by a seed, as torch's `randperm` draws them, so that PEFT's files, which hold
the n numbers alone, mean the same here. The numbers are drawn from a normal distribution, PEFT's
and the paper's start, which is not the base; init_weights=True starts them, and the update, at 0.

By its nature dW, a whole matrix [in, out] a module, is made anew in every step: that costs memory
and time as if the weights themselves moved; what is small is the number of what moves. All float32.

Shapes: l layers of a stack, n the most entries of a module over its layers.

    peft/<module>/fourierft_spectrum [l, n]
    peft_const/<module>/fourierft_scale [l, n]    scaling; zero past a layer's own entries, and in
                                                  layers that are no target
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from bmft import names, peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import beside, matching
from bmft.peft.files import Files, Layout


def make(
    model,
    *,
    n_frequency: int = 1000,
    scaling: float = 150.0,
    random_loc_seed: int = 777,
    init_weights: bool = False,
    targets: tuple[str, ...] = ("query", "value"),
    n_frequency_pattern: tuple[str, ...] = (),
    layers_to_transform: tuple[int, ...] | None = None,
    bias: str = "none",
    modules_to_save: tuple[str, ...] = (),
):
    """n_frequency: entries of a module's spectrum that move; n_frequency_pattern: others by
    unstacked module name, `pattern=value`, the first that matches.

    targets: names of dense layers, or `all-linear`. random_loc_seed: draws which entries. bias:
    none, all, or PEFT's fourier_only, which is those of the targets.
    """
    if n_frequency < 1:
        raise Mistake(f"peft.fourierft.n_frequency is {n_frequency}; it must be 1 or more")
    beside.check_bias("fourierft", bias, "fourier_only")
    table, patterns = model.names, _patterns(n_frequency_pattern)
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, **about)
    counts = _counts(table, sites, patterns, n_frequency)

    def entries(path, shape):
        return _entries(path, shape[-2:], int(counts[path].max()), random_loc_seed)

    def hook(module, call, *args):
        out, path = call(*args), peft.path_of(module)
        if path not in sites:
            return out
        start = jax.nn.initializers.zeros if init_weights else jax.nn.initializers.normal(1.0)
        spectrum = peft.leaf(module, "fourierft_spectrum", start, (int(counts[path].max()),))
        spectrum *= module.get_variable("peft_const", "fourierft_scale")
        shape = args[0].shape[-1], out.shape[-1]
        change = _change(spectrum, entries(path, shape), shape)
        return out + (args[0].astype(jnp.float32) @ change).astype(out.dtype)

    moves, rows = beside.moves("fourierft", sites, ("fourierft_spectrum",), saved, bias)

    def merge(params, added):
        flat, own = tree.flatten(params), tree.flatten(added["peft"])
        scales = tree.flatten(added["peft_const"])
        for path in sites:
            kernel = flat[f"{path}/kernel"]
            spectrum = own[f"{path}/fourierft_spectrum"] * scales[f"{path}/fourierft_scale"]
            change = _change(spectrum, entries(path, kernel.shape), kernel.shape)
            flat[f"{path}/kernel"] = kernel + change
        return tree.unflatten(flat)

    settings = {
        "peft_type": "FOURIERFT",
        "n_frequency": n_frequency,
        "n_frequency_pattern": _spelled(table, sites, counts, patterns, n_frequency),
        "scaling": scaling,
        "random_loc_seed": random_loc_seed,
        "init_weights": init_weights,
        "bias": bias,
        "fan_in_fan_out": False,
    }
    return peft.Method(
        "fourierft",
        moves,
        hook,
        constants={path: {"fourierft_scale": _scale(counts[path], scaling)} for path in sites},
        rows=rows,
        axes={"fourierft_spectrum": "."},
        merge=merge,
        # The normal start changes the logits of random encoders of BERT's sizes by 0.2 to 0.4 of
        # their size: it is no base with a small difference.
        identity=0.0 if init_weights else math.inf,
        files=Files(settings, sites, modules_to_save, *_codec(counts), kinds=("dense",)),
    )


def _change(spectrum, entries, shape):
    """Re(ifft2(F)) [l, in, out] of the numbers spectrum [l, n] at `entries` of F; shape of W."""
    dense = jnp.zeros(shape, jnp.float32).at[(..., *entries)].set(spectrum)
    return jnp.fft.ifft2(dense).real


def _entries(path, shape, count, seed):
    """Where in F [in, out] the numbers stand: two arrays [n]. torch's F is [out, in]."""
    size = math.prod(shape)
    if count > size:
        raise Mistake(
            f"peft.fourierft: {path} has a spectrum of {size} entries, of which {count} cannot "
            f"move; n_frequency, or n_frequency_pattern for it alone, must be {size} or less"
        )
    out, read = np.divmod(permutation(size, count, seed), shape[0])
    return read, out


@functools.lru_cache(maxsize=64)
def permutation(size, count, seed):
    """The first `count` numbers of torch.randperm(size) on the CPU, seeded by `seed`.

    torch shuffles from the front, an output of the Mersenne Twister a place, so the first places
    are final after as many swaps; it goes over to wider numbers beyond some 214 million.
    """
    if size > (2**32 - 1) // 20:
        raise Mistake(f"peft.fourierft: a spectrum of {size} entries is too large to draw from")
    drawn = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32)
    moved, first = {}, []
    for place, number in enumerate(drawn.tolist()):
        other = place + number % (size - place)
        first.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return np.array(first)


def _counts(table, sites, patterns, default):
    """{module path: [l] or []}: how many entries move in each layer; 0 where it is no target."""
    counts, used = {path: np.where(mask, default, 0) for path, mask in sites.items()}, set()
    for path, mask in sites.items():
        for layer in matching.layers(mask):
            called = table.called(path, layer)
            fits = [key for key in patterns if names.pattern_value({key: 1}, called, 0)]
            used |= set(fits)
            counts[path][matching.at(layer)] = patterns[fits[0]] if fits else default
    for key in patterns:
        if key not in used:
            raise Mistake(
                f"peft.fourierft.n_frequency_pattern: {key!r} matches no target; "
                f"{nearest(key, sites)}"
            )
    return counts


def _patterns(entries):
    """{pattern: value} of `pattern=value` entries."""
    found = {}
    for entry in entries:
        key, _, value = entry.rpartition("=")
        try:
            re.compile(key)
            right = key and value.isdecimal() and int(value) > 0
        except re.error:
            right = False
        if not right:
            raise Mistake(
                f"peft.fourierft.n_frequency_pattern: {entry!r} is not of the form "
                "'layer.0.attention.self.query=200'"
            )
        found[key] = int(value)
    return found


def _scale(counts, scaling):
    """[l, n] of counts [l]; [n] of a scalar."""
    return np.where(np.arange(counts.max()) < counts[..., None], scaling, 0).astype(np.float32)


# --- in PEFT's files -------------------------------------------------------------------------


def _codec(counts):
    """`encode` and `decode` of bmft.peft.files.Files."""

    def encode(path, layer, leaves):
        count = counts[path][matching.at(layer)]
        return {"fourierft_spectrum": leaves["fourierft_spectrum"][:count]}

    def decode(path, layer, tensors):
        spectrum = tensors["fourierft_spectrum"]
        missing = counts[path].max() - len(spectrum)
        return {"fourierft_spectrum": np.pad(spectrum, (0, missing))}

    return encode, decode


def _theirs(table, sites, patterns, default):
    """{module path: [l] or []} as PEFT reads n_frequency_pattern: a key fits what follows a dot,
    and a whole name counts where no key fits."""
    counts = {path: np.where(mask, default, 0) for path, mask in sites.items()}
    for path, mask in sites.items():
        for layer in matching.layers(mask):
            name = table.called(path, layer)[1]
            fits = (key for key in patterns if re.match(rf".*\.{key}$", name))
            counts[path][matching.at(layer)] = patterns.get(next(fits, name), default)
    return counts


def _spelled(table, sites, counts, given, default):
    """An n_frequency_pattern by which PEFT gives each module its count: the given one if it does,
    in the sorted order that JSON files have; else an entry a module."""
    explicit = {
        table.called(path, layer)[1]: int(counts[path][matching.at(layer)])
        for path, mask in sites.items()
        for layer in matching.layers(mask)
        if counts[path][matching.at(layer)] != default
    }
    for spelled in (dict(sorted(given.items())), explicit):
        theirs = _theirs(table, sites, spelled, default)
        if all(np.array_equal(theirs[path], counts[path]) for path in sites):
            return spelled
    raise AssertionError(f"no n_frequency_pattern gives {counts}")


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    sites = matching.targets(table, fields, ("dense",))
    default = fields["n_frequency"]
    try:
        counts = _theirs(table, sites, fields["n_frequency_pattern"], default)
    except re.error as error:
        raise Mistake(f"n_frequency_pattern: no regular expression: {error}") from None
    others = {path: mask & (counts[path] != default) for path, mask in sites.items()}
    found = [count for path, mask in others.items() for count in counts[path][mask]]
    called = matching.exact_names(table, others)
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    return {
        "n_frequency": default,
        "scaling": float(fields["scaling"]),
        "random_loc_seed": fields["random_loc_seed"],
        "init_weights": fields["init_weights"],
        "targets": matching.exact_names(table, sites),
        "n_frequency_pattern": tuple(
            f"{name}={count}" for name, count in zip(called, found, strict=True)
        ),
        "bias": fields["bias"],
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
    }


LAYOUT = Layout(
    peft_type="FOURIERFT",
    fields={
        "n_frequency": ((int,), 1000),
        "n_frequency_pattern": ((dict,), {}),
        "scaling": ((int, float), 150.0),
        "random_loc_seed": ((int,), 777),
        "init_weights": ((bool,), False),
        "bias": ((str,), "none"),
    },
    ignored=("fan_in_fan_out",),  # it speaks of GPT-2's layers
    defaults={},
    arguments=_arguments,
)
