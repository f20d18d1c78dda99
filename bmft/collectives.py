"""What a compiled program moves: between chips, by kind, and to and from a chip's memory.

Bytes of a collective are those of the whole array, on one chip: of an all-reduce what is summed, of
an all-gather what comes out, of a reduce-scatter what goes in. `sent` is what a chip sends of it
around a ring of n chips: (n - 1) / n of them, of an all-reduce twice that.
"""

import re
from typing import NamedTuple

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
    body = next((module.computations.get(name) for name in one.callees), None)
    if one.opcode == "fusion" and body:
        return _touched_by_fusion(one, given, body)
    if one.opcode in SLICES:
        return 2 * _held(one.arrays)
    if one.opcode == "dynamic-update-slice":
        return 2 * _held(given[1]) if _held(given[0]) else 0.0
    return _held(one.arrays) + sum(_held(arrays) for arrays in given)


def _held(arrays):
    """Bytes of those that lie in the chip's memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _touched_by_fusion(one, given, body):
    """Bytes of a fusion: of a parameter that is only sliced what the slices take; of a result, or
    a parameter, that is updated in place what is changed."""
    named, users = {inner.name: inner for inner in body}, {}
    for inner in body:
        for place, operand in enumerate(inner.operands):
            users.setdefault(operand, []).append((inner, place))
    total = 0.0
    for inner in body:
        if inner.opcode == "parameter":
            number = int(re.match(r"(\d+)\)", inner.text)[1])
            whole = _held(given[number]) if number < len(given) else 0.0
            total += min(whole, _read(inner, users, named, set())) if whole else 0.0
    written = _held(one.arrays)
    root = next(inner for inner in body if inner.is_root)
    return total + (min(written, _written(root, named)) if written else 0.0)


def _read(inner, users, named, passed):
    """Bytes that the users of an instruction read of it."""
    total = 0.0
    for user, place in users.get(inner.name, ()):
        if user.opcode in SLICES and place == 0:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue  # in place: what is changed is counted where it is written
        elif user.opcode == "bitcast" and user.name not in passed:
            total += _read(user, users, named, passed | {user.name})
        else:
            return sum(array.bytes for array in inner.arrays)
    return total


def _written(root, named):
    """Bytes that a fusion's root writes."""
    if root.opcode == "bitcast" and root.operands[0] in named:
        return _written(named[root.operands[0]], named)
    if root.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in named[root.operands[1]].arrays)
    if root.opcode == "tuple":
        return sum(_written(named[name], named) for name in root.operands if name in named)
    return sum(array.bytes for array in root.arrays)
