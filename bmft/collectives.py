"""What a compiled program moves: between chips, by kind, and to and from a chip's memory.

Bytes of a collective are those of the whole array, on one chip: of an all-reduce what is summed, of
an all-gather what comes out, of a reduce-scatter what goes in. `sent` is what a chip sends of it
around a ring of n chips: (n - 1) / n of them, of an all-reduce twice that.
"""

import re
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
KINDS += ("ragged-all-to-all", "collective-broadcast")
# These name what is there, or begin what another instruction ends.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "async-start", "async-update", "async-done", "copy-done", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "domain", "add-dependency", "get-dimension-size",
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


class Traffic(NamedTuple):
    kind: str
    count: float  # how often a step
    bytes: float  # of all of them together
    sent: float


def collectives(module):
    """[Traffic] by kind, of an `hlo.Module`: what one step makes."""
    seen, found = {}, {}
    for name, instructions in module.computations.items():
        outputs = {one.name: one.arrays for one in instructions}
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or not module.runs[name]:
                continue
            # Begun, carried on and ended in three computations, it is still one; channels tell.
            channel = re.search(r"channel_id=(\d+)", one.text)
            key = channel[1] if channel else (name, one.name)
            if "all-reduce-scatter" in name:
                kind = "reduce-scatter"  # one that XLA made of an all-reduce and a slice
            traffic = _traffic(kind, one, outputs, module, module.runs[name])
            if key not in seen or seen[key].count < traffic.count:
                seen[key] = traffic
    for traffic in seen.values():
        old = found.get(traffic.kind, Traffic(traffic.kind, 0, 0, 0))
        sums = (a + b for a, b in zip(old[1:], traffic[1:], strict=True))
        found[traffic.kind] = Traffic(traffic.kind, *sums)
    return sorted(found.values())


def _traffic(kind, one, outputs, module, runs):
    given = sum(array.bytes for name in one.operands for array in outputs.get(name, ()))
    size = group_size(one.text, module.partitions)
    whole = given * size if kind == "all-gather" else given
    share = (size - 1) / size
    ways = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return Traffic(kind, runs, whole * runs, whole * ways * runs)


def group_size(text, partitions):
    """How many chips take part in a collective with one another, in any of XLA's spellings."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        size = 1
        for axis in re.findall(r"'(\w+)'", named[2]):
            size *= int(sizes[axis])
        return size
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if counted:
        return int(counted[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed and listed[1] else partitions


# --- to and from memory ----------------------------------------------------------------------


def moved(module):
    """Bytes that one step reads from a chip's memory and writes to it: of each instruction what
    goes in and comes out, as far as it does not lie on the chip, and of slices no more than they
    take or change."""
    total = 0.0
    for name, instructions in module.computations.items():
        if module.runs[name] and name not in module.fused:
            outputs = {one.name: one.arrays for one in instructions}
            each = sum(_touched(one, outputs, module) for one in instructions)
            total += each * module.runs[name]
    return total


def _touched(one, outputs, module):
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    given = [outputs.get(name, ()) for name in one.operands]
    if one.opcode == "custom-call" and not given:
        return 0.0  # room is made
    if one.opcode == "fusion" and one.callees:
        return _touched_by_fusion(one, given, module)
    if one.opcode in SLICES:
        return 2 * _held(one.arrays)
    if one.opcode == "dynamic-update-slice":
        return 2 * _held(given[1]) if _held(given[0]) else 0.0
    return _held(one.arrays) + sum(_held(arrays) for arrays in given)


def _held(arrays):
    """Bytes of those that lie in the chip's memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _bytes(arrays):
    return sum(array.bytes for array in arrays)


def _touched_by_fusion(one, given, module):
    """Bytes of a fusion: of a parameter that is only sliced what the slices take; of a result, or
    a parameter, that is updated in place what is changed."""
    body, total = _body(one, module), 0.0
    for number, arrays in enumerate(given):
        if whole := _held(arrays):
            total += min(whole, _read(body.parameter(number), body, module))
    results = _results(body, module)
    if len(results) != len(one.arrays):
        return total + min(_held(one.arrays), sum(results))
    pairs = zip(one.arrays, results, strict=True)
    return total + sum(min(array.bytes, own) for array, own in pairs if array.space == 0)


class _Body(NamedTuple):
    """What a fusion computes."""

    named: dict  # {name: Instruction}
    users: dict  # {name: [(the instruction that takes it, as which operand)]}
    root: Any

    def parameter(self, number):
        found = (one for one in self.named.values() if one.opcode == "parameter")
        return next((one for one in found if int(one.text.partition(")")[0]) == number), None)


def _body(fusion, module):
    instructions = module.computations[fusion.callees[0]]
    users = {}
    for one in instructions:
        for place, operand in enumerate(one.operands):
            users.setdefault(operand, []).append((one, place))
    named = {one.name: one for one in instructions}
    return _Body(named, users, next(one for one in instructions if one.is_root))


def _read(inner, body, module):
    """Bytes that the users of an instruction of a fusion read of it; of none it is not read."""
    total = 0.0
    for user, place in body.users.get(inner.name, ()) if inner else ():
        if user.opcode in SLICES and place == 0:
            total += _bytes(user.arrays)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue  # in place: what is changed is counted where it is written
        elif user.opcode == "bitcast":
            total += _read(user, body, module)
        elif user.opcode == "fusion" and user.callees:
            within = _body(user, module)
            total += _read(within.parameter(place), within, module)
        else:
            return _bytes(inner.arrays)
    return min(total, _bytes(inner.arrays)) if inner else 0.0


def _results(body, module):
    """Bytes that a fusion writes of each of its results."""
    parts = [body.root]
    if body.root.opcode == "tuple":
        parts = [body.named[name] for name in body.root.operands]
    return [_written(one, body, module) for one in parts]


def _written(one, body, module):
    if one.opcode == "bitcast" and one.operands[0] in body.named:
        return _written(body.named[one.operands[0]], body, module)
    if one.opcode == "dynamic-update-slice":
        return _bytes(body.named[one.operands[1]].arrays)
    if one.opcode == "fusion" and one.callees:
        return sum(_results(_body(one, module), module))
    return _bytes(one.arrays)
