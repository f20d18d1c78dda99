"""Teach a language model to answer, with LoRA or any other method: instructions, chats, pairs.

    ./run.sh experiments/instruct_lora.py
    ./run.sh experiments/instruct_lora.py --config=configs/gsm8k_lora.py --config.data.train=FILE
    ./run.sh experiments/instruct_lora.py --config=configs/dpo.py

What is unlike experiments/glue_lora.py: a batch's loss is of tokens, not of examples; and the model
answers some questions before the first step and after the last, which are printed side by side.
Settings, hardware, time: configs/instruct_lora.py. What a run does is in `main`.
"""

import json

import jax

from bmft import (
    errors,
    evaluate,
    log,
    loop,
    models,
    prepare,
    processes,
    sharding,
    train,
    tree,
    writing,
)
from bmft.config import read
from bmft.data import dialog_sources
from bmft.models import weights
from bmft.progress import total_steps
from bmft.run import default_workdir, open_run, write_whole
from bmft.tasks import causal_lm

NAME = "instruct_lora"


def main(argv):
    settings = read(argv, default="configs/instruct_lora.py", groups=groups)
    config, how = settings.config, writing.settings(settings.config.generate)
    sharding.use_all_cores(processes.cores())
    mesh = sharding.mesh(config)

    # What to learn, and from which language model. Nothing heavy is read yet.
    tables = dialog_sources.load(config.data, pairs=config.task.name == "preference")
    task = prepare.find_task(config, tables)
    model = prepare.find_model(config, task.num_outputs)
    methods = prepare.find_methods(config, model)
    base, tokenizer = weights.fingerprint(model), models.tokenizer(model)

    workdir = settings.workdir or default_workdir(NAME, settings.variant, settings.overrides)
    run = open_run(config, workdir, NAME, base)
    if run.finished and not prepare.exports_missing(config, run.path):
        return

    # Dialogs become packed rows, of which the answers are learned; the base is loaded, and what the
    # methods add is put beside it.
    batches = prepare.batches(config, model, methods, task, tables, mesh)
    steps = total_steps(config, batches["train"].steps_per_epoch)
    fit = prepare.fit(config, model, methods, mesh, steps)
    if task.check_moving:
        task.check_moving(fit.labels)
    log.show_leaves(fit.rows)

    outputs_of = evaluate.make_outputs(fit.apply, task.outputs)
    splits = [split for split in tables if split != "train"]
    style = causal_lm.style_of(tables["train"], config.task.template, config.task.separator)
    samples = writing.samples(config, task, tables, tokenizer)
    how["rows"] = writing.rows_at_a_time(config, sharding.rows(mesh))
    how |= {"methods": methods, "put": sharding.put_everywhere(mesh)}
    writer = writing.Writer(fit.apply, None, model, style, **how)
    writer.check(samples.prompts)

    def assess(state, frozen, split, stop=lambda: False):
        variables = train.variables(state, frozen)
        outputs = evaluate.over_split(outputs_of, variables, batches[split], stop)
        return None if outputs is None else task.metrics(outputs, None)

    def write(state):
        return writer.with_variables(train.variables(state, fit.frozen)).write(samples.prompts)

    def leave(state):
        beside = writing.Beside(tokenizer, style)
        about = {"labels": task.labels, "fingerprint": base, "beside": beside}
        prepare.write_exports(config, run.path, model, methods, state, fit.frozen, **about)

    if run.finished:
        state, _ = loop.exported(config, run, fit.state, fingerprint=base)
        leave(state)
        return

    before = at_first(run, fit, splits, assess, write)
    outcome = loop.run(
        config,
        run,
        state=fit.state,
        frozen=fit.frozen,
        step=prepare.make_step(config, fit, task.loss),
        batches=batches["train"],
        evaluate=assess,
        metric=prepare.find_metric(config, task),
        fingerprint=base,
        labels=fit.labels,
        splits=splits,
    )
    leave(outcome.state)
    finish(run, task, fit, outcome, samples, before, write(outcome.state))


def groups(config):
    return prepare.groups(config) | {"data": dialog_sources.KEYS, "generate": writing.KEYS}


def at_first(run, fit, splits, assess, write):
    """What the model does before the first step: {"metrics": {split: ...}, "texts": [...]}.

    A run that is continued has it in before.json."""
    path = run.path / "before.json"

    def read():
        known = run.continued and path.exists()
        return json.loads(path.read_text(encoding="utf-8")) if known else None

    found = processes.from_first(read)
    if found is not None:
        return found
    metrics = {split: assess(fit.state, fit.frozen, split) for split in splits}
    found = {"metrics": metrics, "texts": write(fit.state)}
    if jax.process_index() == 0:
        write_whole(path, json.dumps(found, indent=2) + "\n")
    return found


def finish(run, task, fit, outcome, samples, before, after):
    """Write samples.jsonl and report.json, which makes this a finished run; print both ends."""
    metrics = {"before": before["metrics"], "after": outcome.metrics}
    if task.measure and samples.questions:
        for when, texts in (("before", before["texts"]), ("after", after)):
            own = metrics[when].setdefault(samples.split, {})
            metrics[when][samples.split] = own | task.measure(texts, samples.references)
    moving = tree.count(outcome.state.moving)
    numbers = {"trainable_params": moving, "total_params": fit.count}
    numbers |= {"metrics": metrics["after"], "metrics_before": metrics["before"]}
    if samples.questions and jax.process_index() == 0:
        writing.write_samples(run.path / "samples.jsonl", samples, before["texts"], after)
        rows = zip(samples.questions[:8], before["texts"], after, strict=False)
        log.show_table((f"{samples.split}: question", "before", "after"), rows)
    run.finish({**outcome.report, **numbers})
    for split, values in metrics["before"].items():
        pairs = ((name, value, metrics["after"][split][name]) for name, value in values.items())
        print(split, *(f"{name} {one:.4f} -> {two:.4f}" for name, one, two in pairs))


if __name__ == "__main__":
    raise SystemExit(errors.command(processes.joined(main)))
