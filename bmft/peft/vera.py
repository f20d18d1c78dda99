"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): LoRA with random A and B that stay as they are.

    y = base(x) + lambda_b * B(lambda_d * A(dropout(x)))

A and B are one pair for all modules of all layers, as large as the largest input and output among
them; each module reads the first rows of A and the first columns of B that it has use for. Two
vectors a module move. A and B are uniform in ±sqrt(6 / fan-in), lambda_d starts as d_initial,
lambda_b as zero: the adapted model starts as the base. The update is float32, and so are all four.

Shapes: l layers of a stack, r the rank, in and out of a module, In and Out the largest.

    peft/<module>/vera_lambda_d [l, r]    peft/<module>/vera_lambda_b [l, out]
    peft_shared/vera/a [In, r]            peft_shared/vera/b [r, Out]             never move
"""

import jax

from bmft import names, peft, tree
from bmft.errors import Mistake
from bmft.peft import beside, matching
from bmft.peft.files import Files, Layout

LAMBDAS = ("vera_lambda_d", "vera_lambda_b")
A, B = "peft_shared/vera/a", "peft_shared/vera/b"


def make(
    model,
    *,
    rank: int = 256,
    dropout: float = 0.0,
    d_initial: float = 0.1,
    targets: tuple[str, ...] = ("query", "value"),
    layers_to_transform: tuple[int, ...] | None = None,
    bias: str = "none",
    modules_to_save: tuple[str, ...] = (),
):
    """targets: names of dense layers, or `all-linear`. d_initial: where lambda_d starts."""
    _check(rank, dropout)
    beside.check_bias("vera", bias)
    table = model.names
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, **about)

    def shared(key, params):
        flat = tree.flatten(params)
        sizes = [flat[f"{path}/kernel"].shape[-2:] for path in sites]
        largest_in, largest_out = (max(side) for side in zip(*sizes, strict=True))
        key_a, key_b = jax.random.split(key)
        uniform = jax.nn.initializers.he_uniform()
        return {"a": uniform(key_a, (largest_in, rank)), "b": uniform(key_b, (rank, largest_out))}

    def hook(module, call, *args):
        out, path = call(*args), peft.path_of(module)
        if path not in sites:
            return out
        x = peft.dropout(module, args[0].astype("float32"), dropout)
        started = jax.nn.initializers.constant(d_initial)
        lambda_d = peft.leaf(module, "vera_lambda_d", started, (rank,))
        # Zero in layers that are no target, too, where it never moves.
        lambda_b = peft.leaf(module, "vera_lambda_b", jax.nn.initializers.zeros, out.shape[-1:])
        a, b = _parts(peft.shared("vera"), x.shape[-1], out.shape[-1])
        return out + (((x @ a) * lambda_d) @ b * lambda_b).astype(out.dtype)

    moves, rows = beside.moves("vera", sites, LAMBDAS, saved, bias)

    settings = {
        "peft_type": "VERA",
        "r": rank,
        "vera_dropout": dropout,
        "d_initial": d_initial,
        "save_projection": True,
        "bias": bias,
        "fan_in_fan_out": False,
    }
    return peft.Method(
        "vera",
        moves,
        hook,
        shared=shared,
        rows=rows,
        axes={"vera_lambda_d": ".", "vera_lambda_b": "o"},
        undecayed=("vera_lambda_d",),
        merge=_merge,
        files=Files(
            settings,
            sites,
            modules_to_save,
            _encode,
            _decode,
            kinds=("dense",),
            encode_others=lambda leaves: {
                "base_model.vera_A": leaves[A].T,
                "base_model.vera_B": leaves[B].T,
            },
            decode_others=lambda tensors: {
                A: tensors["base_model.vera_A"].T,
                B: tensors["base_model.vera_B"].T,
            },
        ),
    )


def _parts(own, read, out):
    """What a module with so many inputs and outputs uses of A and B."""
    return own["a"][:read], own["b"][:, :out]


def _merge(params, added):
    """W + A lambda_d B lambda_b on every module that has the lambdas; [l, in, out]."""
    flat, own = tree.flatten(params), tree.flatten(added["peft"])
    for path in [path for path in own if path.endswith("/vera_lambda_d")]:
        module = path.rpartition("/")[0]
        kernel, lambda_d, lambda_b = (
            flat[f"{module}/kernel"],
            own[path],
            own[f"{module}/vera_lambda_b"],
        )
        a, b = _parts(added["peft_shared"]["vera"], *kernel.shape[-2:])
        update = (a * lambda_d[..., None, :]) @ b * lambda_b[..., None, :]
        flat[f"{module}/kernel"] = kernel + update
    return tree.unflatten(flat)


def _check(rank, dropout):
    if rank < 1:
        raise Mistake(f"peft.vera.rank is {rank}; it must be 1 or more")
    if not 0 <= dropout < 1:
        raise Mistake(f"peft.vera.dropout is {dropout}; it must be in [0, 1)")


# --- in PEFT's files -------------------------------------------------------------------------


def _encode(path, layer, leaves):
    return {name: leaves[name] for name in LAMBDAS}


def _decode(path, layer, tensors):
    return {name: tensors[name] for name in LAMBDAS}


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    if not fields["save_projection"]:
        raise Mistake(
            "save_projection is false: vera_A and vera_B are not in the file, and only torch's "
            "random numbers make them again; save it from peft with save_projection=True"
        )
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    return {
        "rank": fields["r"],
        "dropout": float(fields["vera_dropout"]),
        "d_initial": float(fields["d_initial"]),
        "targets": matching.exact_names(table, matching.targets(table, fields, ("dense",))),
        "bias": fields["bias"],
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
    }


LAYOUT = Layout(
    peft_type="VERA",
    fields={
        "r": ((int,), 256),
        "vera_dropout": ((int, float), 0.0),
        "d_initial": ((int, float), 0.1),
        "save_projection": ((bool,), True),
        "bias": ((str,), "none"),
    },
    # fan_in_fan_out speaks of GPT-2's layers; how the start was found is of no matter afterwards.
    ignored=("fan_in_fan_out", "init_weights", "projection_prng_key"),
    defaults={},
    arguments=_arguments,
)
