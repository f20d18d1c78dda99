"""How many operations a function makes, counted by formula from its jaxpr.

The compiler's own count (`compiled.cost_analysis()`) takes the body of a loop once, and the layers
of a model are a loop. Here a scan's body counts as often as it runs, what is computed again for the
gradient counts again, and of the branches of a cond the dearest counts. An operation is a
multiplication or an addition: a product of [m, k] and [k, n] makes 2 m k n.

    products     of matrices and convolutions: what a chip's peak is of
    elementwise  one for each number that arithmetic makes; moving numbers is none
    uncounted    primitives of which no formula is known here, and loops of unknown length (their
                 bodies are counted once)
"""

import math
from typing import NamedTuple

from jax.extend import core

# What computes nothing but where numbers lie, or of which type they are.
MOVES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice",
    "dynamic_update_slice", "gather", "iota", "name", "optimization_barrier", "pad", "reshape",
    "rev", "scatter", "select_n", "sharding_constraint", "slice", "split", "squeeze",
    "stop_gradient", "transpose", "bitcast_convert_type", "device_put", "expand_dims",
    "random_wrap", "random_unwrap", "random_seed", "copy_p", "pvary", "mesh_cast", "reshard",
}  # fmt: skip
REDUCES = ("reduce_", "cum", "arg")  # as many operations as numbers go in
UNKNOWN = {
    "cholesky", "custom_linear_solve", "eig", "eigh", "ffi_call", "fft", "householder_product",
    "lu", "pallas_call", "pure_callback", "qr", "schur", "svd", "triangular_solve",
    "tridiagonal_solve",
}  # fmt: skip


class Operations(NamedTuple):
    products: float = 0.0
    elementwise: float = 0.0
    uncounted: frozenset = frozenset()

    @property
    def total(self):
        return self.products + self.elementwise

    def times(self, count):
        return self._replace(products=self.products * count, elementwise=self.elementwise * count)

    def plus(self, other):
        return Operations(
            self.products + other.products,
            self.elementwise + other.elementwise,
            self.uncounted | other.uncounted,
        )


def count(jaxpr):
    """The `Operations` of a jaxpr, closed or not: of `jax.jit(f).trace(...)`, its `.jaxpr`."""
    jaxpr, found = getattr(jaxpr, "jaxpr", jaxpr), Operations()
    for equation in jaxpr.eqns:
        found = found.plus(_of_equation(equation))
    return found


def _of_equation(equation):
    name, inner = equation.primitive.name, [*_jaxprs(equation.params)]
    if name == "dot_general":
        return Operations(products=_dot(equation))
    if name == "conv_general_dilated":
        return Operations(products=_convolution(equation))
    if name == "scan":
        return count(equation.params["jaxpr"]).times(equation.params["length"])
    if name == "cond":
        return max((count(branch) for branch in equation.params["branches"]), key=_total)
    if name == "while":
        once = count(equation.params["body_jaxpr"])
        return once._replace(uncounted=once.uncounted | {"while"})
    if name == "shard_map":
        devices = math.prod(equation.params["mesh"].shape.values())
        return count(equation.params["jaxpr"]).times(devices)
    if name in UNKNOWN:
        return Operations(uncounted=frozenset({name}))
    if inner:  # pjit, checkpoint, custom_jvp_call, custom_vjp_call
        return count(inner[0])
    return Operations(elementwise=_elementwise(name, equation))


def _total(operations):
    return operations.total


def _jaxprs(params):
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one


def _dot(equation):
    lhs, rhs = (v.aval.shape for v in equation.invars[:2])
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    inner = math.prod(lhs[axis] for axis in contracted)
    both = math.prod(lhs[axis] for axis in batched)
    return 2.0 * math.prod(lhs) * math.prod(rhs) / (inner * both) if inner and both else 0.0


def _convolution(equation):
    """2 of each number of the output and of its window; zeros between the inputs' numbers, as the
    gradient of a strided convolution has them, are not multiplied."""
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    window = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    spread = math.prod(equation.params["lhs_dilation"])
    groups = equation.params["batch_group_count"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * window / (spread * groups)


def _elementwise(name, equation):
    if name in MOVES:
        return 0.0
    sized = equation.invars if name.startswith(REDUCES) else equation.outvars
    shapes = [getattr(v.aval, "shape", ()) for v in sized]
    return float(max((math.prod(shape) for shape in shapes), default=0))
