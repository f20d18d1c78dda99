"""A compiled program's text, read: its computations, and how often each runs in one call.

    module = read(compiled.as_text())
    module.computations["while_body"]     -> [Instruction, ...]
    module.runs["while_body"]             -> 32.0

XLA writes a loop as a while; one that counts from 0 up to a constant, as a scan becomes, runs that
often. Of a loop that is none such, the body counts once and `module.unknown` is raised by one.
"""

import re
from typing import NamedTuple

BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
CALLS = r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
BRANCHES = r"(?:branch_computations|called_computations)=\{([^}]*)\}"
FUSED = ("fusion", "reduce", "all-reduce", "reduce-scatter", "reduce-window", "scatter", "sort")


class Array(NamedTuple):
    dtype: str
    shape: tuple
    space: int  # 0: the chip's main memory; others are on the chip itself

    @property
    def bytes(self):
        size = BYTES.get(self.dtype)
        if size is None:
            size = int(re.search(r"\d+", self.dtype)[0]) / 8  # bf16, f8e4m3fn, s32
        for side in self.shape:
            size *= side
        return size


class Instruction(NamedTuple):
    name: str
    arrays: tuple  # what comes out
    opcode: str
    operands: tuple  # names
    text: str  # of the operands and what follows them
    is_root: bool

    @property
    def callees(self):
        found = re.findall(CALLS, self.text)
        for names in re.findall(BRANCHES, self.text):
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return found


class Module(NamedTuple):
    computations: dict  # {name: [Instruction]}
    runs: dict  # {name: how often it runs}
    fused: set  # computations within an instruction, which touch no memory by themselves
    unknown: int  # loops of unknown length
    partitions: int  # chips that it is for


def read(text):
    """The `Module` of the text of a compiled program."""
    computations, entry, here = {}, None, None
    for line in text.splitlines():
        opens = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opens:
            here = computations.setdefault(opens[2], [])
            entry = opens[2] if opens[1] else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and " = " in line:
            here.append(_instruction(line))
    runs, fused, unknown = _count_runs(computations, entry)
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, runs, fused, unknown, int(partitions[1]) if partitions else 1)


def arrays(text):
    """The `Array`s of a type as XLA writes it."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text)
    return tuple(
        Array(
            dtype,
            tuple(int(side) for side in sides.split(",") if side),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, sides, layout in found
    )


def _instruction(line):
    left, _, right = line.strip().partition(" = ")
    kind = right[: _closing(right)] if right.startswith("(") else right.partition(" ")[0]
    opcode, _, rest = right[len(kind) :].strip().partition("(")
    inside = rest[: _closing("(" + rest) - 2]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, arrays(kind), opcode, operands, rest, left.startswith("ROOT "))


def _closing(text):
    """Where the first bracket of a text is closed, behind it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    return len(text)


def _count_runs(computations, entry):
    """({computation: runs}, the fused ones, the number of loops of unknown length)."""
    runs, fused, unknown = dict.fromkeys(computations, 0.0), set(), 0
    runs[entry] = 1.0
    for name in reversed(computations):  # who is called stands before who calls
        for instruction in computations[name]:
            callees = [one for one in instruction.callees if one in computations]
            times = 1
            if instruction.opcode == "while":
                times = trips(computations, callees)
                unknown += times is None
            if instruction.opcode in FUSED or name in fused:
                fused.update(callees)
            for callee in callees:
                runs[callee] += runs[name] * (times or 1)
    return runs, fused, unknown


def trips(computations, callees):
    """How often a loop runs whose condition is `i < constant`; None where it is another."""
    for name in callees:
        body = {one.name: one for one in computations[name]}
        root = next(one for one in body.values() if one.is_root)
        compare = _comparison(computations, root)
        if compare is None or [one.dtype for one in root.arrays] != ["pred"]:
            continue
        bounds = [body[name] for name in root.operands if body[name].opcode == "constant"]
        found = re.match(r"(\d+)\)", bounds[0].text) if bounds else None
        if found:
            return int(found[1]) + ("direction=LE" in compare.text)
    return None


def _comparison(computations, root):
    """The compare that an instruction is, or has fused; None where there is none."""
    if root.opcode == "compare":
        return root
    inner = (one for name in root.callees for one in computations.get(name, ()))
    return next((one for one in inner if one.opcode == "compare"), None)
