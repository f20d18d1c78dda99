"""A plan (bmft/plan.py) as text for people: tables of leaves, lines of numbers."""

import math

from bmft import tree
from bmft.abstract import bytes_a_chip

UNITS = ("", "k", "M", "G", "T", "P", "E")


def leaves(fit):
    """[[leaf, shape, dtype, status, rule, axes of the mesh, numbers, bytes a chip]] of a `Fit` of
    shapes: a row for each leaf that moves or is quantized, one for each kind of the others."""
    held = tree.flatten(tree.join(fit.state.moving, fit.state.stats, fit.frozen))
    rows, others = [], {}
    for path, *about, count in fit.rows:
        if path in fit.labels:
            leaf = held[path]
            rows.append([path, *_plain(about), axes(leaf), count, bytes_a_chip(leaf)])
        elif about[2] == "quantized":
            parts = [leaf for name, leaf in held.items() if name.startswith(f"quant/{path[:-7]}/")]
            codes = max(parts, key=lambda leaf: leaf.size)
            rows.append([path, *_plain(about), axes(codes), count, bytes_a_chip(parts)])
    for path, leaf in held.items():
        if path not in fit.labels and not path.startswith("quant/"):
            others.setdefault((axes(leaf), str(leaf.dtype)), []).append((path, leaf))
    for (where, dtype), group in sorted(others.items()):
        largest = max(group, key=lambda one: one[1].size)[0]
        name = largest + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        parts = [leaf for _, leaf in group]
        count = sum(leaf.size for leaf in parts)
        rows.append([name, None, dtype, "frozen", None, where, count, bytes_a_chip(parts)])
    return rows


def _plain(about):
    shape, dtype, status, rule = about
    return list(shape) if shape else None, str(dtype), status, rule


def axes(leaf):
    """By which axes of the mesh each axis of a leaf is split: `-,fsdp,tensor`; whole: `-`."""
    spec = list(leaf.sharding.spec)
    names = [
        "-" if one is None else "+".join([one] if isinstance(one, str) else one) for one in spec
    ]
    while names and names[-1] == "-":
        names.pop()
    return ",".join(names) or "-"


def text(plan):
    """The plan as lines."""
    parts = [_head(plan)] if "topology" in plan else []
    if "tried" in plan:
        parts.append(_tried(plan["tried"]))
    if "leaves" in plan:
        parts += [_leaves(plan), _memory(plan), _work(plan)]
    if "estimate" in plan:
        parts.append(_estimate(plan))
    return "\n\n".join(parts)


def _head(plan):
    where, batch = plan["topology"], plan["batch"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    chip = f" {where['chip']['name']}" if where["chip"] else ""
    lines = [
        f"{plan['config']}: {plan['model']}, {'+'.join(plan['methods'])}, {plan['task']}",
        f"{where['name']}: {where['chips']}{chip}, mesh {mesh}",
    ]
    rows = f"{batch['examples']} examples a step in {batch['rows']} rows"
    if "tokens" in batch:
        rows += f" of {batch['row_length']} tokens, {batch['padding_share']:.1%} padding"
    lines.append(rows + (f", in {batch['parts']} parts" if batch["parts"] > 1 else ""))
    return "\n".join(lines + plan["notes"])


def _leaves(plan):
    titles = ("leaf", "shape", "dtype", "status", "rule", "split by", "numbers", "bytes a chip")
    rows = [
        (path, "x".join(map(str, shape or ())), dtype, status, rule or "", where)
        + (f"{count:,}", si(held, "B"))
        for path, shape, dtype, status, rule, where, count, held in plan["leaves"]
    ]
    numbers = plan["numbers"]
    share = numbers["moving"] / numbers["all"]
    last = f"{numbers['moving']:,} of {numbers['all']:,} numbers move ({share:.3%})"
    return table([titles, *rows], right=2) + "\n" + last


def _memory(plan):
    held = plan["arguments"]
    lines = ["memory of a chip, by shapes and shardings:"]
    lines += [f"  {name:<22} {si(size, 'B'):>10}" for name, size in held.items()]
    lines.append(f"  {'arguments':<22} {si(sum(held.values()), 'B'):>10}")
    chip = plan["topology"]["chip"]
    has = f" of {si(chip['memory'], 'B')} ({chip['memory'] / 2**30:.4g} GiB)" if chip else ""
    if "too_large" in plan:
        lines.append(f"does not fit, says the compiler: {plan['too_large']}")
    elif "memory" in plan:
        lines.append("memory of a chip, by the compiler:")
        lines += [f"  {name:<22} {si(size, 'B'):>10}" for name, size in plan["memory"].items()]
        lines[-1] += has
    else:
        lines.append("not compiled (no compiler of this chip here): temporaries are not known,")
        lines.append(f"nor what is sent; the chip has{has.removeprefix(' of')}")
    if plan["fits"] is not None:
        lines.append("it fits" if plan["fits"] else "it does not fit")
    return "\n".join(lines)


def _work(plan):
    made, chips = plan["operations"], plan["topology"]["chips"]
    lines = [
        "operations of a step, on all chips, by formula (the jaxpr; loops by their length):",
        f"  {'products':<22} {si(made['products']):>10}",
    ]
    if "products_without_remat" in made:
        again = made["products"] - made["products_without_remat"]
        lines.append(f"  {'of them computed again':<22} {si(again):>10}")
    lines.append(f"  {'elementwise':<22} {si(made['elementwise']):>10}")
    lines.append(f"  {'products a chip':<22} {si(made['products'] / chips):>10}")
    if made["uncounted"]:
        lines.append(f"  not counted, or once: {', '.join(made['uncounted'])}")
    if "moved" in plan:
        lines += ["a chip's traffic in a step, in the compiled program (loops by their length):"]
        lines.append(f"  {'memory':<22} {si(plan['moved'], 'B'):>10}")
        for one in plan["collectives"]:
            how = f"{one['count']:,.0f} times, {si(one['sent'], 'B')} sent"
            lines.append(f"  {one['kind']:<22} {si(one['bytes'], 'B'):>10}   {how}")
        if plan["loops_of_unknown_length"]:
            lines.append(f"  loops of unknown length: {plan['loops_of_unknown_length']}")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan["seconds"].items())
    return "\n".join([*lines, f"measured on this machine: {times}"])


def _estimate(plan):
    found = plan["estimate"]
    parts = ", ".join(
        f"{name} {seconds * 1e3:.3g} ms" for name, seconds in found["seconds"].items()
    )
    lines = [f"estimate: bound by {found['bound_by']} ({parts})"]
    lines.append(f"  {'':<22} {'best':>12} {'worst':>12}")
    for name in found["best"]:
        both = (f"{number(one[name], name):>12}" for one in (found["best"], found["worst"]))
        lines.append(f"  {name.replace('_', ' '):<22} {' '.join(both)}")
    if plan["topology"]["platform"] == "gpu":
        lines.append("  not compiled: memory's traffic is the arguments alone, links carry nothing")
    return "\n".join([*lines, *(f"  assumed: {one}" for one in plan["assumptions"])])


def _tried(rows):
    titles = ("mesh", "batch", "remat", "peak a chip", "outcome", "examples/s (estimate)")
    cells = [
        (row["mesh"], str(row["batch_size"]), row["remat"])
        + (si(row["peak"], "B") if row["peak"] else "", row["outcome"])
        + (number(row["rate"], "") if row["rate"] else "",)
        for row in rows
    ]
    last = "" if any(row["outcome"] == "fits" for row in rows) else "\nnone of them fits"
    return "tried:\n" + table([titles, *cells], right=1) + last


# --- numbers and columns ---------------------------------------------------------------------


def si(value, unit=""):
    """1.23 GB of 1.23e9."""
    power = 0 if value < 1 else min(int(math.log10(value) // 3), len(UNITS) - 1)
    return f"{value / 1000**power:.3g} {UNITS[power]}{unit}".rstrip()


def number(value, name):
    if name == "mfu":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(rows, right=0):
    """Rows of texts in columns; the last `right` columns end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) - right
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        placed = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(cells)
        ]
        lines.append("  ".join(placed).rstrip())
    return "\n".join(lines)
