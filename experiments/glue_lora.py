"""Fine-tune a text classifier with LoRA, or with any other method, on tweets, GLUE or your file.

    ./run.sh experiments/glue_lora.py
    ./run.sh experiments/glue_lora.py --config=configs/glue_lora.py:sst2 --config.data.dir=DIR
    ./run.sh experiments/glue_lora.py --config.peft.methods=bitfit --config.seed=1

Settings, hardware, time and expected score: configs/glue_lora.py. Fork this file for another
experiment: what a run does is in `main`, from top to bottom.
"""

from bmft import errors, evaluate, log, loop, models, prepare, processes, sharding, train, tree
from bmft.config import read
from bmft.data import glue, sources
from bmft.models import weights
from bmft.progress import total_steps
from bmft.run import default_workdir, open_run

NAME = "glue_lora"


def main(argv):
    settings = read(argv, default="configs/glue_lora.py", groups=prepare.groups)
    config = settings.config
    sharding.use_all_cores(processes.cores())
    mesh = sharding.mesh(config)

    # What to learn, and from which pretrained model. Nothing heavy is read yet.
    tables = sources.load(config.data)
    task = prepare.find_task(config, tables)
    model = prepare.find_model(config, task.num_outputs)
    methods = prepare.find_methods(config, model)
    base = weights.fingerprint(model)

    workdir = settings.workdir or default_workdir(NAME, settings.variant, settings.overrides)
    run = open_run(config, workdir, NAME, base)
    if run.finished and not prepare.exports_missing(config, run.path):
        return

    # Text becomes packed rows; the base is loaded, and what the methods add is put beside it.
    batches = prepare.batches(config, model, methods, task, tables, mesh)
    steps = total_steps(config, batches["train"].steps_per_epoch)
    fit = prepare.fit(config, model, methods, mesh, steps)
    log.show_leaves(fit.rows)

    outputs_of = evaluate.make_outputs(fit.apply, task.outputs)

    def assess(state, frozen, split, stop):
        variables = train.variables(state, frozen)
        outputs = evaluate.over_split(outputs_of, variables, batches[split], stop)
        return None if outputs is None else task.metrics(outputs, task.targets(tables[split]))

    def leave(state):
        tokenizer = models.tokenizer(model)
        about = {"labels": task.labels, "fingerprint": base, "beside": tokenizer}
        prepare.write_exports(config, run.path, model, methods, state, fit.frozen, **about)

    if run.finished:
        state, _ = loop.exported(config, run, fit.state, fingerprint=base)
        leave(state)
        return

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
        splits=[split for split in tables if split != "train" and tables[split].labels],
    )

    leave(outcome.state)
    for split, table in tables.items():
        if table.labels is None and table.glue:
            variables = train.variables(outcome.state, fit.frozen)
            outputs = evaluate.over_split(outputs_of, variables, batches[split])
            if processes.index() == 0:
                path = glue.write_submission(run.path / "submission", table.glue, split, outputs)
                print("wrote", path)
    finish(run, fit, outcome)


def finish(run, fit, outcome):
    """Write report.json, which makes this a finished run, and print the metrics in it."""
    moving = tree.count(outcome.state.moving)
    numbers = {"trainable_params": moving, "total_params": fit.count}
    run.finish({**outcome.report, **numbers})
    for split, values in outcome.metrics.items():
        print(split, *(f"{name} {value:.4f}" for name, value in values.items()))


if __name__ == "__main__":
    raise SystemExit(errors.command(processes.joined(main)))
