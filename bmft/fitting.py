"""The search of `bmft.plan --fit`: the mesh, batch and remat of the fastest step that fits.

Candidates are all meshes of powers of two, the batch of the config and its doubles, and both
policies of remat. What each asks at least, of computing and memory and, where weights are split by
fsdp, of links, is known from shapes; in the order of that bound they are compiled, until none can
be faster than the best that fits, or MOST have been.
"""

import sys
from typing import Any, NamedTuple

from ml_collections.config_dict import ConfigDict, FrozenConfigDict

from bmft import abstract, operations, roofline
from bmft.errors import Mistake

DOUBLES = (1, 2, 4, 8)
REMAT = ("none", "block")
MOST = 12  # compilations, of a minute or so each for a model of 8 billion numbers
MOST_TENSOR = 8  # chips along `tensor`: more of them wait for one another


class Candidate(NamedTuple):
    mesh: tuple  # chips along data, fsdp, tensor
    batch_size: int
    remat: str
    bound: float  # examples a second that it cannot exceed

    def __str__(self):
        mesh = "x".join(map(str, self.mesh))
        return f"mesh {mesh}, batch {self.batch_size}, remat {self.remat}"

    def config(self, config):
        """The config with what the candidate changes."""
        changed = ConfigDict(config.to_dict())
        changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor = self.mesh
        changed.train.batch_size, changed.model.remat = self.batch_size, self.remat
        return FrozenConfigDict(changed)

    def row(self, outcome, peak=None, rate=None):
        mesh = "x".join(map(str, self.mesh))
        about = {"mesh": mesh, "batch_size": self.batch_size, "remat": self.remat}
        return about | {"outcome": outcome, "peak": peak, "rate": rate}


class Tried(NamedTuple):
    rows: list  # of Candidate.row
    best: Any  # the plan of the fastest that fits; None if none does


def search(config, where, told, make):
    """`Tried`. make: (config, where, told) -> plan. Raises Mistake where nothing can be compiled,
    or no mesh suits the model."""
    if where.platform != "tpu":
        raise Mistake(f"--fit compiles for TPUs, not for {where.name}: what fits is not known")
    rows, found, refused = [], [], None
    each = {}  # {remat: operations of a row}
    for mesh in meshes(where.count):
        first = Candidate(mesh, config.train.batch_size, config.model.remat, 0.0)
        try:
            shapes = _shapes(first.config(config), where, told)
        except Mistake as mistake:
            refused = mistake
            rows.append(first.row(str(mistake)))
            continue
        if shapes.held > where.chip.memory:
            rows.append(first.row("arguments do not fit", shapes.held))
            continue
        each = each or _operations(shapes.found)
        found += _candidates(config, first, shapes, where, each)
    if not found and refused:
        raise refused
    best = _compile(sorted(found, key=lambda one: -one.bound), config, where, told, make, rows)
    return Tried(rows, best)


def meshes(count):
    """(data, fsdp, tensor) of all meshes of so many chips, those split least first."""
    twos = [1 << i for i in range(count.bit_length()) if count % (1 << i) == 0]
    return [
        (count // (fsdp * tensor), fsdp, tensor)
        for tensor in twos
        for fsdp in twos
        if tensor <= MOST_TENSOR and count % (fsdp * tensor) == 0
    ]


class _Shapes(NamedTuple):
    found: abstract.Abstract
    held: int  # bytes of the arguments on a chip
    gathered: float  # bytes of weights that a chip gets from others in one pass


def _shapes(config, where, told):
    found = abstract.find(config, where.mesh(config), where.platform, told)
    arguments = found.program()[1]
    frozen = abstract.bytes_a_chip(found.fit.frozen)
    fsdp = found.mesh.shape["fsdp"]
    return _Shapes(found, abstract.bytes_a_chip(arguments), frozen * (fsdp - 1))


def _operations(found):
    """{remat: products of a step for each row of its batch}."""
    rows = len(_rows(found.batch))
    made = {}
    for remat in REMAT:
        step, arguments = abstract.with_module(found, remat=remat).program()
        made[remat] = operations.count(step.trace(*arguments).jaxpr).products / rows
    return made


def _rows(batch):
    return range(next(iter(batch.values())).shape[0])


def _candidates(config, first, shapes, where, each):
    """The candidates of one mesh with their bounds."""
    chip, made = where.chip, []
    rows = len(_rows(shapes.found.batch))
    multiple = first.mesh[0] * first.mesh[1] * config.train.accumulate
    for times in DOUBLES:
        # Twice the examples need twice the rows, but for what was rounded up to the chips.
        padded = -(-rows * times // multiple) * multiple
        for remat in REMAT:
            passes = 2 if remat == "none" else 3
            work = roofline.Work(
                each[remat] * padded / where.count, 0.0, shapes.held, passes * shapes.gathered
            )
            size = first.batch_size * times
            seconds = roofline.estimate(work, chip, where.count, examples=size)["seconds"]
            made.append(Candidate(first.mesh, size, remat, size / sum(seconds.values())))
    return made


def _compile(candidates, config, where, told, make, rows):
    """The plan of the fastest that fits; what was tried is put into `rows`."""
    best, fastest, large, count = None, 0.0, [], 0
    for one in candidates:
        if one.bound <= fastest or count == MOST:
            break
        if any(_asks_more(one, other) for other in large):
            continue
        print(f"compiling {one}", file=sys.stderr, flush=True)  # takes a while each
        plan, count = make(one.config(config), where, told), count + 1
        if not plan["fits"]:
            large.append(one)
            rows.append(one.row("does not fit", plan.get("memory", {}).get("peak")))
            continue
        work, size = roofline.Work(**plan["work"]), one.batch_size
        worst = roofline.estimate(work, where.chip, where.count, examples=size)["worst"]
        rate = worst["examples_per_second"]
        rows.append(one.row("fits", plan["memory"]["peak"], rate))
        if rate > fastest:
            best, fastest = plan, rate
    left = len(candidates) - count
    if best is None and count == MOST:
        raise Mistake(f"--fit: none of {MOST} candidates fits {where.name}; {left} were not tried")
    return best


def _asks_more(one, other):
    """Does a candidate ask for no less memory than another, which did not fit?"""
    no_less = one.batch_size >= other.batch_size and (one.remat == "none" or other.remat == "block")
    return one.mesh == other.mesh and no_less
