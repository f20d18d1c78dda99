"""What a run will need, before anything is rented: its leaves, memory, operations, traffic, time.

    ./run.sh -m bmft.plan --config=configs/large_lora.py:llama3_8b --config.model.name=DIR \\
        --topology=v5e:4x4 --price=1.2 [--examples=N] [--fit] [--json] [--config.KEY=VALUE ...]

Nothing is loaded but config.json and, of weights that are here, their names and shapes. The very
step of the run is compiled for the TPU on this machine's CPU (package libtpu), for which no TPU is
needed; of GPUs all is said that needs no compiling. `cpu` is this machine. What is not the
compiler's word or a count is labelled `estimate`, with its assumptions.

What data would say is told: --examples of an epoch, --classes where no task.labels name them, and
--tokens of an example on average; without it all are taken to have data.max_length.
"""

import json
import os
import time
from pathlib import Path

import jax

from bmft import (
    abstract,
    collectives,
    fitting,
    hlo,
    operations,
    plan_text,
    roofline,
    sharding,
    topology,
)
from bmft.config import ROOT, read
from bmft.errors import Mistake, Parser, command

DEFAULT = "configs/glue_lora.py"


def main(argv):
    options, rest = _parser().parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is left alone
    sharding.use_all_cores(os.cpu_count())
    settings = read(rest, default=DEFAULT, groups=abstract.groups)
    where = topology.find(options.topology)
    told = abstract.Told(options.classes, options.tokens, options.examples)
    for name in ("classes", "tokens", "examples", "price"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise Mistake(f"--{name}={value:g}: needs a number above 0")
    file = Path(settings.file)
    shown = str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)
    shown += f":{settings.variant}" if settings.variant else ""
    if options.fit:
        tried = fitting.search(settings.config, where, told, make)
        found = {"tried": tried.rows} | (tried.best or {})
    else:
        found = make(settings.config, where, told)
    found = {"config": shown} | found
    if "work" in found:
        add_estimate(found, where, told, options.price)
    print(json.dumps(found, indent=2) if options.json else plan_text.text(found))


def _parser():
    parser = Parser("bmft.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--topology", default="cpu", help="v5e:4x4, v6e:8x8, h100x8, cpu, ...")
    parser.add_argument("--price", type=float, help="of a chip for an hour, in any currency")
    parser.add_argument("--examples", type=int, help="of an epoch")
    parser.add_argument("--classes", type=int, help="of the data, where task.labels is empty")
    parser.add_argument("--tokens", type=int, help="of an example, on average")
    parser.add_argument("--fit", action="store_true", help="search mesh, batch and remat")
    parser.add_argument("--json", action="store_true")
    return parser


def make(config, where, told):
    """The plan of a config for a `topology.Topology`, {name: plain values}; see plan_text."""
    mesh = where.mesh(config)
    found = abstract.find(config, mesh, where.platform, told)
    step, arguments = found.program()
    began = time.monotonic()
    traced = step.trace(*arguments)
    counted = operations.count(traced.jaxpr)
    seconds = {"tracing": time.monotonic() - began}
    plan = {
        "topology": _topology(where),
        "model": config.model.name,
        "methods": list(config.peft.methods),
        "task": config.task.name,
        "mesh": dict(mesh.shape),
        "notes": _notes(config, found, told),
        "batch": _batch(config, found),
        "steps": abstract.steps(config, told),
        "leaves": plan_text.leaves(found.fit),
        "numbers": {"moving": _moving(found.fit.rows), "all": found.fit.count},
        "arguments": _arguments(found),
        "operations": counted._replace(uncounted=sorted(counted.uncounted))._asdict(),
    }
    needed = counted.products
    if config.model.remat != "none":
        needed = _without_remat(found)
        plan["operations"]["products_without_remat"] = needed
    work = roofline.Work(counted.products / where.count, needed / where.count, 0.0, 0.0)
    if where.platform == "gpu":
        held = sum(plan["arguments"].values())
        work = work._replace(moved=held)
    else:
        plan |= _compiled(traced, seconds)
        work = work._replace(moved=plan.get("moved", 0), sent=_sent(plan))
    plan["seconds"] = seconds
    plan["fits"] = _fits(plan, where.chip)
    return plan | {"work": work._asdict()}


def _topology(where):
    chip = where.chip._asdict() if where.chip else None
    return {"name": where.name, "platform": where.platform, "chips": where.count, "chip": chip}


def _notes(config, found, told):
    notes = []
    if found.without_weights:
        lack = ", ".join(found.model.heads)
        lack = f"{lack} alone" if lack else "nothing"
        notes.append(f"no weights are here; assumed: their files lack {lack}")
    if abstract.steps(config, told) is None:
        notes.append("how long the run is, is not known: --examples=N of an epoch would tell")
    if found.tokens:
        notes.append("assumed: all examples are as long as one another")
    if config.task.name == abstract.IMAGES:
        notes.append("features of a frozen backbone are computed anew in every step of this plan")
    return notes


def _batch(config, found):
    shape = next(iter(found.batch.values())).shape
    about = {
        "examples": config.train.batch_size,
        "rows": shape[0],
        "parts": config.train.accumulate,
    }
    if found.tokens:
        about |= {"row_length": shape[1], "tokens": found.tokens}
        about["padding_share"] = 1 - found.tokens / (shape[0] * shape[1])
    return about


def _moving(rows):
    return sum(row[-1] for row in rows if row[3] in ("moved", "added", "measured"))


def _arguments(found):
    """{what: bytes a chip}."""
    state = found.fit.state
    parts = {"moving": state.moving, "optimizer": state.opt, "frozen": found.fit.frozen}
    parts |= {"rest": (state.stats, state.memory, state.key, state.step), "batch": found.batch}
    return {name: abstract.bytes_a_chip(part) for name, part in parts.items()}


def _without_remat(found):
    """Products of the same step where nothing is computed twice."""
    step, arguments = abstract.with_module(found, remat="none").program()
    return operations.count(step.trace(*arguments).jaxpr).products


def _compiled(traced, seconds):
    """What the compiler says of a traced step; `too_large` in its place where it does not fit."""
    began = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"too_large": " ".join(str(error).split())[:300]}
    finally:
        seconds["compiling"] = time.monotonic() - began
    module, stats = hlo.read(compiled.as_text()), compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "in_place": stats.alias_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    return {
        "memory": memory,
        "collectives": [one._asdict() for one in collectives.collectives(module)],
        "moved": collectives.moved(module),
        "loops_of_unknown_length": module.unknown,
    }


def _sent(plan):
    return sum(one["sent"] for one in plan.get("collectives", ()))


def _fits(plan, chip):
    """Whether a step fits a chip's memory; None where that is not known."""
    if "too_large" in plan:
        return False
    if chip is None:
        return None
    if "memory" not in plan:
        return False if sum(plan["arguments"].values()) > chip.memory else None
    return plan["memory"]["peak"] <= chip.memory


def add_estimate(plan, where, told, price=None):
    """Put `estimate` into a plan whose step fits a chip of which figures are known."""
    if where.chip is None or plan["fits"] is False:
        return
    batch, examples = plan["batch"], told.examples
    plan["estimate"] = roofline.estimate(
        roofline.Work(**plan["work"]),
        where.chip,
        where.count,
        examples=batch["examples"],
        tokens=batch.get("tokens"),
        steps=plan["steps"],
        epoch_steps=examples and -(-examples // batch["examples"]),
        price=price,
    )
    plan["assumptions"] = list(roofline.ASSUMPTIONS)


if __name__ == "__main__":
    raise SystemExit(command(main))
