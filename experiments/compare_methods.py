"""Compare methods on one task with one budget, over several seeds, on one frozen base.

    ./run.sh experiments/compare_methods.py
    ./run.sh experiments/compare_methods.py --config.compare.methods=lora_r8,bitfit,full

What is compared, and what the keys mean: configs/compare_methods.py. Each run is one of
experiments/glue_lora.py, but the base is loaded once, and the programs of a method compile once. A
run's line is in results.jsonl as soon as it ends, and the table and the picture follow. The same
command goes on where it was stopped, within a run, too.

    WORKDIR/results.jsonl, table.md, table.csv, plot.png    see bmft/comparison.py
    WORKDIR/runs/lora_r8-0/    of method and seed: config.json, metrics.jsonl, curves.png
"""

import pathlib
import shutil
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections.config_dict import FrozenConfigDict

from bmft import (
    comparison,
    errors,
    evaluate,
    loop,
    models,
    peft,
    prepare,
    processes,
    sharding,
    train,
    tree,
)
from bmft.config import read
from bmft.data import sources
from bmft.errors import Mistake
from bmft.models import weights
from bmft.progress import total_steps
from bmft.run import MAY_DIFFER, default_workdir, open_run, warn

NAME = "compare_methods"
KEYS = {
    "methods": (tuple[str, ...], ()),
    "seeds": (tuple[int, ...], (0, 1)),
    "validation_examples": (int | None, None),
    "test_examples": (int | None, None),
}
# These stand in the config file, so that what a name means is the same in every run.
OF_A_METHOD = ("seed", "peft", "optim.learning_rate", "optim.head_learning_rate")


def main(argv):
    settings = read(argv, default="configs/compare_methods.py", groups=groups)
    config = settings.config
    check(settings)
    sharding.use_all_cores(processes.cores())
    mesh = sharding.mesh(config)

    # What to learn, and all that is compared: a mistake in a method comes before the first run.
    tables = cut(sources.load(config.data), config.compare)
    task = prepare.find_task(config, tables)
    model = prepare.find_model(config, task.num_outputs)
    entries = {name: entry(argv, settings, name) for name in config.compare.methods}
    methods = {name: prepare.find_methods(one, model) for name, one in entries.items()}
    base = weights.fingerprint(model)

    workdir = settings.workdir or default_workdir(NAME, settings.variant, settings.overrides)
    free = (*MAY_DIFFER, "compare.methods", "compare.seeds")
    whole = open_run(config, workdir, NAME, base, may_differ=free, may_grow=False)
    jobs = []
    for seed in config.compare.seeds:  # a first table of all methods comes early
        for name, one in entries.items():
            own = FrozenConfigDict(one.to_dict() | {"seed": seed})
            run = open_run(own, whole.path / "runs" / f"{name}-{seed}", NAME, base, may_grow=False)
            jobs.append(Job(name, seed, own, methods[name], run))

    with whole.lock():
        report = Report(config, whole.path, jobs, task, tables)
        left = [job for job in jobs if (job.name, job.seed) not in report.results.rows]
        failed = compute_all(left, Common(model, task, tables, mesh, base), report) if left else []
        report.write()
    if jax.process_index() == 0:  # the others may be here before it is written
        print(f"\n{(whole.path / 'table.md').read_text()}")
    if failed:
        raise Mistake(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}")


class Job(NamedTuple):
    """One run to make."""

    name: str
    seed: int
    config: Any
    methods: tuple
    run: Any  # bmft.run.Run


class Common(NamedTuple):
    """What all runs share."""

    model: Any
    task: Any
    tables: dict
    mesh: Any
    fingerprint: str

    def batches(self, job, kept):
        """{split: Batches} of a job's seed and virtual tokens, kept for the methods that follow."""
        key = job.seed, peft.virtual_ids(job.methods, self.model)
        if key not in kept:
            for old in [old for old in kept if old[0] != job.seed]:
                del kept[old]
            kept[key] = prepare.batches(
                job.config, self.model, job.methods, self.task, self.tables, self.mesh
            )
        return kept[key]


# --- the command line ------------------------------------------------------------------------


def groups(config):
    return prepare.groups(config) | {"compare": KEYS}


def check(settings):
    """Raises Mistake for a command line that compares nothing, or not like with like."""
    chosen = settings.config.compare
    for key in settings.overrides:
        if any(f"{key}.".startswith(f"{own}.") for own in OF_A_METHOD):
            where = "compare.seeds" if key == "seed" else f"METHODS of {settings.file}"
            raise Mistake(f"{key} is a run's own here: see {where}")
    for key in ("methods", "seeds"):
        if not chosen[key] or len(set(chosen[key])) < len(chosen[key]):
            raise Mistake(f"compare.{key}={chosen[key]}: name each once, and at least one")
    if settings.config.checkpoint.folder:
        raise Mistake("checkpoint.folder: the runs of a comparison have theirs in --workdir")
    for key in ("validation_examples", "test_examples"):
        if chosen[key] is not None and chosen[key] < 1:
            raise Mistake(f"compare.{key}={chosen[key]}: needs at least 1")


def entry(argv, settings, name):
    """The config of one method: a variant of the config file, and what the command line changes."""
    own = [argument for argument in argv if argument.startswith("--config.")]
    own = [argument for argument in own if not argument.startswith("--config.compare.")]
    found = read([f"--config={settings.file}:{name}", *own], default=None, groups=prepare.groups)
    config = found.config.to_dict()
    # What does not decide the course of a run is the comparison's.
    return FrozenConfigDict(config | {group: settings.config[group] for group in MAY_DIFFER})


def cut(tables, compare):
    """The tables, with so many examples of those that are evaluated. A file may lie in the order of
    its labels, so they are taken from all over it."""
    limits = {"validation": compare.validation_examples, "test": compare.test_examples}

    def some(split, table):
        limit = limits.get(split.partition("_")[0])
        if limit is None or limit >= table.size:
            return table
        return table.take(np.arange(limit) * table.size // limit)

    return {split: some(split, table) for split, table in tables.items()}


# --- the runs --------------------------------------------------------------------------------


def compute_all(jobs, common, report):
    """Make the runs, each with its line in the report; the names of those that failed."""
    how = {key: jobs[0].config.model[key] for key in ("quantize", "storage")}
    shared = prepare.load(common.model, jax.random.key(0), common.mesh, **how)
    batches, programs, failed, started = {}, {}, [], time.monotonic()
    for done, job in enumerate(jobs):
        print(f"\n{job.name}, seed {job.seed} ({done + 1} of {len(jobs)})", flush=True)
        own = common.batches(job, batches)
        try:
            report.add(job, compute(job, common, shared, own, programs))
        except Mistake as mistake:  # of one method: the others go on
            if processes.several():  # it may be of one process, for which the others would wait
                raise
            warn(f"{job.name}, seed {job.seed}: {mistake}")
            failed.append(f"{job.name}-{job.seed}")
            continue
        if jax.process_index() == 0:  # which measures them
            shutil.rmtree(job.run.path / "checkpoints", ignore_errors=True)
        minutes = (time.monotonic() - started) / 60 * (len(jobs) / (done + 1) - 1)
        print(f"about {minutes:.0f} minutes to go", flush=True)
    return failed


def compute(job, common, shared, batches, programs):
    """One run, as in experiments/glue_lora.py: what of it comes into the report.

    programs: {name: Programs} of the methods that have run before, which is added to.
    """
    config, task, tables = job.config, common.task, common.tables
    steps = total_steps(config, batches["train"].steps_per_epoch)
    fit = prepare.fit(config, common.model, job.methods, common.mesh, steps, shared=shared)
    if job.name not in programs:
        step = prepare.make_step(config, fit, task.loss)
        outputs_of = evaluate.make_outputs(fit.apply, task.outputs)
        programs[job.name] = Programs(Measured(step), outputs_of)
    step, outputs_of = programs[job.name]
    step.seconds.clear()

    def assess(state, frozen, split, stop):
        variables = train.variables(state, frozen)
        outputs = evaluate.over_split(outputs_of, variables, batches[split], stop)
        return None if outputs is None else task.metrics(outputs, task.targets(tables[split]))

    moving = tree.count(fit.state.moving)
    outcome = loop.run(
        config,
        job.run,
        state=fit.state,
        frozen=fit.frozen,
        step=step,
        batches=batches["train"],
        evaluate=assess,
        metric=prepare.find_metric(config, task),
        fingerprint=common.fingerprint,
        labels=fit.labels,
        splits=measured_splits(tables),
    )
    beside = {"fingerprint": common.fingerprint, "beside": models.tokenizer(common.model)}
    prepare.write_exports(
        config, job.run.path, common.model, job.methods, outcome.state, fit.frozen,
        labels=task.labels, **beside,
    )  # fmt: skip
    return {
        "metrics": outcome.metrics,
        "learning_rate": config.optim.learning_rate,
        "moving_parameters": moving,
        "total_parameters": fit.count,
        "step_seconds": statistics.median(step.seconds) if step.seconds else None,
        "temporary_bytes": step.temporary_bytes,
        "checkpoint_bytes": size_of(job.run.path / "checkpoints" / str(outcome.step) / "state"),
        "wall_seconds": outcome.report["wall_seconds"],
    }


class Programs(NamedTuple):
    """What a method compiles; the seed is in its arguments."""

    step: Any
    outputs_of: Any


class Measured:
    """A jitted step that is compiled before it is called, and times each call to its end."""

    def __init__(self, step):
        self._step = step
        self._compiled = {}
        self.seconds = []
        self.temporary_bytes = None  # of the first program, beside its arguments

    def __call__(self, state, frozen, batch):
        leaves = jax.tree.leaves((state, batch))
        kind = tuple((leaf.shape, leaf.sharding) for leaf in leaves)
        if kind not in self._compiled:
            program = self._step.lower(state, frozen, batch).compile()
            if not self._compiled:
                self.temporary_bytes = program.memory_analysis().temp_size_in_bytes
            self._compiled[kind] = program
        since = time.perf_counter()
        result = jax.block_until_ready(self._compiled[kind](state, frozen, batch))
        self.seconds.append(time.perf_counter() - since)
        return result


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- the report ------------------------------------------------------------------------------


def measured_splits(tables):
    return [split for split in tables if split != "train" and tables[split].labels]


class Report:
    """The lines of the runs, and what is made of them: of those that are compared now."""

    def __init__(self, config, folder, jobs, task, tables):
        self.results = comparison.Results(folder / "results.jsonl")
        self._folder, self._jobs = folder, jobs
        splits = measured_splits(tables)
        if not splits:
            raise Mistake("data: no validation or test split has labels to compare by")
        self._split = next((split for split in splits if split.startswith("test")), splits[0])
        self._metric, self._direction = prepare.find_metric(config, task)
        length = f"{config.train.steps} steps" if config.train.steps else ""
        length = length or f"{config.train.epochs:g} epochs"
        self._title = (
            f"{config.data.name}, {pathlib.Path(config.model.name).name}, {length} of "
            f"{config.train.batch_size}; {self._split}: {tables[self._split].size:,} examples"
        )

    def add(self, job, found):
        """Write the line of a run that has ended, and all that is made of the lines."""
        value = found["metrics"][self._split][self._metric]
        if jax.process_index() == 0:
            self.results.add({"method": job.name, "seed": job.seed, "value": value, **found})
        self.write()
        print(f"{self._split} {self._metric} {value:.4f}", end="; ")

    def write(self):
        keys = [(job.name, job.seed) for job in self._jobs]
        rows = [self.results.rows[key] for key in keys if key in self.results.rows]
        if rows and jax.process_index() == 0:
            metric = f"{self._split} {self._metric}"
            made_of = {"metric": metric, "direction": self._direction, "title": self._title}
            comparison.write(self._folder, rows, **made_of)


if __name__ == "__main__":
    raise SystemExit(errors.command(processes.joined(main)))
