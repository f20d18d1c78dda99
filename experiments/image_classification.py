"""Fine-tune an image classifier, convolutional or ViT, with LoRA or any other method.

    ./run.sh experiments/image_classification.py
    ./run.sh experiments/image_classification.py --config=configs/cifar_resnet.py:resnet20 \\
        --config.model.name=FILE.safetensors --config.data.train=FILE.npz
    ./run.sh experiments/image_classification.py --config.peft.methods=conv_adapter

Differs from experiments/glue_lora.py in its data: images, decoded on the host and augmented in the
step; in running statistics, which are part of the state; and in features of a frozen backbone,
which are computed once. Settings, hardware, time and expected score: configs/digits_vgg.py.
"""

import pathlib

from bmft import (
    errors,
    evaluate,
    log,
    loop,
    prepare,
    prepare_images,
    processes,
    sharding,
    train,
    tree,
)
from bmft.config import read
from bmft.progress import total_steps
from bmft.run import default_workdir, open_run, write_whole
from bmft.tasks import image_classification

NAME = "image_classification"


def main(argv):
    settings = read(argv, default="configs/digits_vgg.py", groups=prepare_images.groups)
    config = settings.config
    sharding.use_all_cores(processes.cores())
    mesh = sharding.mesh(config)

    # What to learn, and from which pretrained model. No weights are read yet.
    problem = prepare_images.find(config)
    tables, task, model = problem.tables, problem.task, problem.model

    name = pathlib.Path(settings.file).stem
    workdir = settings.workdir or default_workdir(name, settings.variant, settings.overrides)
    run = open_run(config, workdir, NAME, problem.base)
    if run.finished and not prepare.exports_missing(config, run.path):
        return
    if processes.index() == 0:
        write_skipped(run.path, tables)

    batches = prepare_images.batches(config, problem, mesh)
    steps = total_steps(config, batches["train"].steps_per_epoch)
    fit = prepare.fit(config, model, problem.methods, mesh, steps)
    log.show_leaves(fit.rows)

    def leave(state):
        about = {"fingerprint": problem.base, "beside": problem.preprocessor}
        prepare.write_exports(
            config, run.path, model, problem.methods, state, fit.frozen, labels=task.labels, **about
        )

    if run.finished:
        state, _ = loop.exported(config, run, fit.state, fingerprint=problem.base)
        leave(state)
        return

    # Where the first pieces of the model are frozen, what they make of each image is kept.
    fit, batches = prepare_images.reuse_features(config, fit, batches, problem, mesh)
    outputs_of = evaluate.make_outputs(fit.apply, task.outputs)

    def outputs(state, split, stop=lambda: False):
        variables = train.variables(state, fit.frozen)
        return evaluate.over_split(outputs_of, variables, batches[split], stop)

    def assess(state, frozen, split, stop):
        found = outputs(state, split, stop)
        return None if found is None else task.metrics(found, task.targets(tables[split]))

    labelled = [split for split in tables if tables[split].labels is not None]
    outcome = loop.run(
        config,
        run,
        state=fit.state,
        frozen=fit.frozen,
        step=prepare.make_step(config, fit, task.loss),
        batches=batches["train"],
        evaluate=assess,
        metric=prepare.find_metric(config, task),
        fingerprint=problem.base,
        labels=fit.labels,
        splits=[split for split in labelled if split != "train"],
    )

    leave(outcome.state)
    last = outputs(outcome.state, labelled[-1])
    if processes.index() == 0:
        write_classes(run.path, task, tables, labelled[-1], last)
    finish(run, fit, outcome)


def write_classes(folder, task, tables, split, outputs):
    """per_class.csv and confusion.png of a split: the last that has labels."""
    targets = task.targets(tables[split])
    rows = image_classification.per_class(outputs, targets, task.labels)
    write_whole(folder / "per_class.csv", image_classification.csv_text(rows))
    image_classification.draw_confusion(folder / "confusion.png", outputs, targets, task.labels)
    print(f"wrote per_class.csv and confusion.png of {split} in {folder}")


def write_skipped(folder, tables):
    """skipped.txt: a line for each image that data.skip_bad left out."""
    lines = [f"{split}\t{what}" for split, table in tables.items() for what in table.skipped]
    if lines:
        write_whole(folder / "skipped.txt", "\n".join(lines) + "\n")


def finish(run, fit, outcome):
    """Write report.json, which makes this a finished run, and print the metrics in it."""
    moving = tree.count(outcome.state.moving)
    run.finish({**outcome.report, "trainable_params": moving, "total_params": fit.count})
    for split, values in outcome.metrics.items():
        print(split, *(f"{name} {value:.4f}" for name, value in values.items()))


if __name__ == "__main__":
    raise SystemExit(errors.command(processes.joined(main)))
