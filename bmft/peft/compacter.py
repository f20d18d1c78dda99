"""Compacter (Karimi Mahabadi et al. 2021, arXiv:2106.04647): Houlsby's adapters (bmft.peft.adapter)
whose kernels are sums of Kronecker products, of matrices that all of them share with low-rank ones:

    h + up(nonlinearity(down(h)))        d -> d / reduction -> d
    down, up: x -> x sum over i of kron(A_i, S_i T_i) + bias        i of n

after attention and after the MLP; Compacter++ is `attention=False`, after the MLP only. The base's
layer norms move, too. Where the paper leaves it open, this is what its authors ran
(github.com/rabeehk/compacter, configs/compacter.json):

  - one set of A for down and up of every layer, normal of std 1e-4 (`rule_std`; the code's own
    default is 0.01);
  - S_i and T_i each uniform in ±sqrt(12 / (rows + columns)), Glorot's with a gain of sqrt 2; biases
    zero;
  - GELU by its tanh, no norms inside, reduction 32, n = 4, rank 1.

The kernels are never built: x is [.., n, d / n], and meets S, A, T in turn, for which n (d + m)
multiplications a token take the place of d m.

    peft_shared/compacter/rule [n, n, n]
    peft/<module>/compacter_down_{left,right} [l, n, d / n, r], [l, n, r, m / n]
    peft/<module>/compacter_up_{left,right} [l, n, m / n, r], [l, n, r, d / n]
    peft/<module>/compacter_{down,up}_bias [l, m], [l, d]
"""

import jax
import jax.numpy as jnp

from bmft import layers, peft
from bmft.errors import Mistake, nearest
from bmft.peft import adapter

ZEROS = jax.nn.initializers.zeros
LEAVES = [f"compacter_{a}_{b}" for a in ("down", "up") for b in ("left", "right", "bias")]


def make(
    model,
    *,
    n: int = 4,
    rank: int = 1,
    reduction: int = 32,
    nonlinearity: str = "gelu_new",
    attention: bool = True,
    norms: bool = True,
    rule_std: float = 1e-4,
):
    """n: Kronecker products in a kernel; it divides the width and the bottleneck. attention: an
    adapter after attention, too. norms: the base's layer norms move, too. rule_std: of A."""
    for key, number in (("n", n), ("rank", rank), ("reduction", reduction), ("rule_std", rule_std)):
        if number <= 0:
            raise Mistake(f"peft.compacter.{key} is {number}; it must be above 0")
    if nonlinearity not in layers.ACTIVATIONS:
        near = nearest(nonlinearity, layers.ACTIVATIONS)
        raise Mistake(f"peft.compacter.nonlinearity: no {nonlinearity!r}; {near}")
    modules = adapter.BOTH if attention else adapter.AFTER_MLP
    adapter.check_places(model, modules, "compacter", "Compacter")

    def shared(key, params):
        return {"rule": rule_std * jax.random.normal(key, (n, n, n))}

    def bottleneck(module, x):
        d = x.shape[-1]
        m = d // reduction
        _check_divides(n, d, m, reduction)
        rule = peft.shared("compacter")["rule"]
        h = _linear(module, "down", x.astype(jnp.float32), m, rule, rank)
        return _linear(module, "up", layers.ACTIVATIONS[nonlinearity](h), d, rule, rank)

    def hook(module, call, *args):
        if peft.path_of(module) not in modules:
            return call(*args)
        return adapter.houlsby(lambda x: bottleneck(module, x).astype(x.dtype), call, *args)

    def moves(path):
        own = path.startswith("peft/") and "/compacter_" in path
        own = own or path.startswith("peft_shared/compacter/")
        return "compacter" if own or (norms and adapter.is_norm(path)) else None

    return peft.Method(
        "compacter",
        moves,
        hook,
        shared=shared,
        axes=dict.fromkeys(LEAVES, "."),
        undecayed=("compacter_down_bias", "compacter_up_bias"),
        # By its two kernels, each of which goes with A; rounding alone is some 1e-6.
        identity=max(1e-5, 12 * rank * (n * rule_std) ** 2),
    )


def _linear(module, name, x, out, rule, rank):
    """x kernel + bias; x [.., in] -> [.., out]."""
    n, width = len(rule), x.shape[-1]
    left = peft.leaf(module, f"compacter_{name}_left", _glorot, (n, width // n, rank))
    right = peft.leaf(module, f"compacter_{name}_right", _glorot, (n, rank, out // n))
    bias = peft.leaf(module, f"compacter_{name}_bias", ZEROS, (out,))
    x_pc = x.reshape(*x.shape[:-1], n, width // n)
    y_qo = jnp.einsum("...pc,icr,ipq,iro->...qo", x_pc, left, rule, right)
    return y_qo.reshape(*x.shape[:-1], out) + bias


def _glorot(key, shape, dtype):
    bound = (12 / (shape[-2] + shape[-1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _check_divides(n, width, inside, reduction):
    if width % n:
        divisors = [k for k in range(2, 9) if width % k == 0]
        raise Mistake(
            f"peft.compacter.n is {n}, which does not divide the width {width}; "
            f"try one of {divisors or [1]}"
        )
    if not inside or inside % n:
        fits = [r for r in range(reduction, 0, -1) if width // r and width // r % n == 0]
        raise Mistake(
            f"peft.compacter.n is {n}, which does not divide the bottleneck {inside}, the width "
            f"{width} over peft.compacter.reduction {reduction}; try the reduction {fits[0]}"
        )
