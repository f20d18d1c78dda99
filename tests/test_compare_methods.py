"""Several methods and seeds by one command, on a tiny model: its tables, its end, its mistakes."""

import csv
import json
import os
import signal
import statistics

import jax
import numpy as np
import pytest
import tiny

from bmft import comparison, loop, models, prepare, sharding, tree
from bmft.config import read
from bmft.errors import Mistake, command
from configs.compare_methods import METHODS
from experiments import compare_methods, glue_lora

CONFIG = """
from configs import base

METHODS = {
    "rank_3": (("lora",), {"lora": {"rank": 3, "alpha": 7.0}}, 0.02),
    "biases": (("bitfit",), {}, 0.01),
    "all": (("full",), {}, 0.002),
}


def get_config(variant=None):
    config = base.get_config()
    config.train.steps = 6
    config.train.batch_size = 12
    if variant is None:
        config.compare = {"methods": ("rank_3", "all"), "test_examples": 15}
        config.log.tensorboard = False
        config.eval.every = 100
        config.export.adapter = False
        return config
    methods, groups, rate = METHODS[variant]
    config.peft.methods = methods
    config.peft.update(groups)
    config.optim.learning_rate = rate
    return config


VARIANTS = tuple(METHODS)
"""
HEAD = 24 * 2 + 2


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.directory(folder / "model", hidden_dropout_prob=0.1)
    tiny.tokenizer(folder / "model")
    (folder / "few.py").write_text(CONFIG)
    data = [one for one in tiny.data(folder / "data") if "data.validation" not in one]
    return [f"--config={folder / 'few.py'}", f"--config.model.name={folder / 'model'}", *data]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished comparison: 2 methods, 2 seeds."""
    workdir = tmp_path_factory.mktemp("comparison") / "finished"
    assert command(compare_methods.main, [*arguments, f"--workdir={workdir}"]) == 0
    return workdir


def lines(workdir):
    text = (workdir / "results.jsonl").read_text()
    return {(row["method"], row["seed"]): row for row in map(json.loads, text.splitlines())}


def table(workdir):
    return {row["method"]: row for row in csv.DictReader((workdir / "table.csv").open())}


def test_lines_and_tables_say_the_same(finished):
    rows, rates = lines(finished), {"rank_3": 0.02, "all": 0.002}
    order = [(name, seed) for seed in (0, 1) for name in rates]
    assert list(rows) == order  # a first table of all methods comes early
    found = table(finished)
    written = (finished / "table.md").read_text()
    assert (finished / "plot.png").stat().st_size > 10_000
    for name, rate in rates.items():
        runs, row = [rows[name, seed] for seed in (0, 1)], found[name]
        scores = [run["metrics"]["test"]["accuracy"] for run in runs]
        assert all(round(score * 15, 6).is_integer() for score in scores)  # of 21
        mean, spread = statistics.fmean(scores), statistics.stdev(scores)
        assert float(row["test_accuracy_mean"]) == pytest.approx(mean)
        assert float(row["spread"]) == pytest.approx(spread)
        assert float(row["learning_rate"]) == rate
        assert f"| {name} | {mean:.4f} | {spread:.4f} | 2 |" in written
        for field in ("step_seconds", "temporary_bytes", "checkpoint_bytes"):
            assert float(row[field]) > 0
    means = [float(row["test_accuracy_mean"]) for row in found.values()]
    assert means == sorted(means, reverse=True)


def test_what_moves_is_counted(finished):
    found = {name: int(row["moving_parameters"]) for name, row in table(finished).items()}
    assert found["rank_3"] == 2 * 3 * 3 * (24 + 24) + HEAD
    assert found["all"] > found["rank_3"]
    assert float(table(finished)["all"]["share"]) == 1.0
    sizes = {name: int(row["checkpoint_bytes"]) for name, row in table(finished).items()}
    assert sizes["all"] > 12 * found["all"] > sizes["rank_3"] > 12 * found["rank_3"]  # and headers
    assert not list(finished.glob("runs/*/checkpoints"))


def test_a_run_is_that_of_the_experiment_itself(arguments, finished, tmp_path):
    """The shared base, and the programs of another seed, change nothing."""
    file, *others = arguments
    argv = [f"{file}:all", *others, "--config.seed=1", "--config.eval.every=100"]
    argv += ["--config.export.adapter=False", "--config.log.tensorboard=False"]
    assert command(glue_lora.main, [*argv, f"--workdir={tmp_path}/run"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    row = lines(finished)["all", 1]
    assert report["metrics"]["train"] == row["metrics"]["train"]


def test_the_frozen_base_is_shared_and_what_moves_is_not(arguments):
    file, *others = arguments
    config = read([f"{file}:biases", *others], None, prepare.groups).config
    model, mesh = prepare.find_model(config, 2), sharding.mesh(config)
    shared = prepare.load(model, jax.random.key(0), mesh)
    base = tree.flatten(shared.params)
    fit = prepare.fit(config, model, prepare.find_methods(config, model), mesh, 6, shared)
    frozen = tree.flatten(fit.frozen["params"])
    assert all(leaf is base[path] for path, leaf in frozen.items())
    assert "layers/mlp/up/kernel" in frozen and "layers/mlp/up/bias" not in frozen
    for leaf in jax.tree.leaves(fit.state):  # as a step does, which takes its memory
        leaf.delete()
    assert all(np.isfinite(leaf).all() for leaf in base.values())


def test_stopped_and_continued_gives_the_same(arguments, finished, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of the second run; then a line torn by a kill."""
    workdir, counted, measured = tmp_path / "stopped", [], compare_methods.Measured.__call__
    few = ["--config.compare.seeds=1"]

    def call(self, *given):
        counted.append(1)
        if len(counted) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(self, *given)

    monkeypatch.setattr(compare_methods.Measured, "__call__", call)
    argv = [*arguments, *few, f"--workdir={workdir}"]
    assert command(compare_methods.main, argv) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert list(lines(workdir)) == [("rank_3", 1)]
    assert set(table(workdir)) == {"rank_3"}
    with open(workdir / "results.jsonl", "a") as file:
        file.write('{"method": "al')
    assert command(compare_methods.main, argv) == 0
    assert len(counted) == 12  # no step was made twice
    again, found = lines(workdir), table(workdir)
    assert list(again) == [("rank_3", 1), ("all", 1)]
    for key, row in again.items():
        for field in ("metrics", "value", "moving_parameters"):
            assert row[field] == lines(finished)[key][field]
        assert float(found[key[0]]["test_accuracy_mean"]) == row["value"]
        assert found[key[0]]["spread"] == ""


def test_a_finished_comparison_is_not_made_again_and_may_grow(
    arguments, finished, monkeypatch, capsys
):
    before, computed = (finished / "results.jsonl").read_text(), []
    monkeypatch.setattr(loop, "run", lambda *_, **__: computed.append(1))
    argv = [*arguments, f"--workdir={finished}", "--config.compare.methods=all"]
    assert command(compare_methods.main, argv) == 0
    assert computed == []
    assert "| all |" in capsys.readouterr().out
    assert set(table(finished)) == {"all"}
    assert (finished / "results.jsonl").read_text() == before
    argv = [*arguments, f"--workdir={finished}"]
    assert command(compare_methods.main, argv) == 0
    assert set(table(finished)) == {"rank_3", "all"}


def test_one_method_that_fails_is_not_the_end_of_the_others(
    arguments, tmp_path, monkeypatch, capsys
):
    compute = compare_methods.compute

    def one_fails(job, *given):
        if job.name == "all":
            raise Mistake("loss is nan at step 2")
        return compute(job, *given)

    monkeypatch.setattr(compare_methods, "compute", one_fails)
    argv = [*arguments, f"--workdir={tmp_path}/run", "--config.compare.seeds=0"]
    argv += ["--config.compare.methods=all,biases"]
    assert command(compare_methods.main, argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == "error: 1 of 2 runs failed: all-0"
    assert "warning: all, seed 0: loss is nan at step 2" in error
    assert set(table(tmp_path / "run")) == {"biases"}


MISTAKES = [
    ("--config.compare.methods=rank_3,al", "no variant 'al'; did you mean 'all'"),
    ("--config.compare.methods=all,all", "compare.methods"),
    ("--config.compare.seeds=", "compare.seeds"),
    ("--config.compare.test_examples=0", "compare.test_examples=0"),
    ("--config.compare.test_exmples=5", "did you mean 'compare.test_examples'"),
    ("--config.peft.lora.rank=4", "peft.lora.rank is a run's own here: see METHODS"),
    ("--config.optim.learning_rate=1", "optim.learning_rate is a run's own here"),
    ("--config.seed=1", "see compare.seeds"),
    ("--config.train.steps=7", "holds another run (train.steps: 6 != 7): choose"),
    ("--config.compare.test_examples=9", "(compare.test_examples: 15 != 9)"),
]


@pytest.mark.parametrize("argument, says", MISTAKES)
def test_mistakes_end_with_one_line(arguments, finished, capsys, argument, says):
    argv = [*arguments, argument, f"--workdir={finished}"]
    assert command(compare_methods.main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


def test_another_entry_of_the_same_name_is_refused(arguments, finished, tmp_path, capsys):
    (tmp_path / "few.py").write_text(CONFIG.replace('"rank": 3', '"rank": 4'))
    argv = [f"--config={tmp_path / 'few.py'}", *arguments[1:], f"--workdir={finished}"]
    assert command(compare_methods.main, argv) == 2
    assert "peft.lora.rank: 3 != 4" in capsys.readouterr().err


# --- the tables and the picture of lines that are given


def line(method, seed, value, **changes):
    row = dict.fromkeys(comparison.FIELDS, 1)
    return row | {"method": method, "seed": seed, "value": value, "total_parameters": 8} | changes


def test_summaries():
    rows = [line("a", 0, 0.5), line("a", 1, 0.7), line("b", 0, 0.65), line("c", 0, None)]
    rows[1] |= {"step_seconds": 3, "checkpoint_bytes": 4}
    best, second, last = comparison.summarise(rows)
    assert (best.method, best.spread, second.method) == ("b", None, "a")
    assert (second.mean, second.spread) == pytest.approx((0.6, 0.02**0.5))
    assert (second.step_seconds, second.checkpoint_bytes, second.share) == (2, 2, 0.125)
    assert (last.method, last.mean) == ("c", None)
    assert comparison.summarise(rows, "min")[0].method == "a"


def test_no_label_of_the_picture_lies_on_another():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    points = [(10.0 ** (3 + i % 3 / 9), 0.7 + i % 4 / 300) for i in range(24)]
    figure = Figure(figsize=(11, 7), dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlim=(1e2, 1e7), ylim=(0.5, 0.8))  # a crowd
    axes.plot(*zip(*points, strict=True), "o")
    comparison._label(figure, axes, [f"method_{i}" for i in range(24)], points)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()  # of the text alone, without the line that leads to it
    boxes = [Text.get_window_extent(text, renderer).extents for text in axes.texts]
    assert len(boxes) == 24
    for i, box in enumerate(boxes):
        assert not any(comparison._meet(box, other) for other in boxes[:i])


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_of_the_config_can_be_made(name, tmp_path):
    found = read([f"--config=configs/compare_methods.py:{name}"], None, prepare.groups).config
    config = {"vocab_size": 3000, "hidden_size": 32, "max_position_embeddings": 64}
    tiny.directory(tmp_path / "model", **config)
    methods = prepare.find_methods(found, models.find(str(tmp_path / "model"), outputs=3))
    assert [method.name for method in methods] == list(found.peft.methods)
    assert found.data.name == "tweets"
