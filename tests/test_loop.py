"""The loop on a toy problem: what it records, and that no way of stopping it changes its end."""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import loop_toy
import numpy as np
import pytest

from bmft import loop
from bmft.errors import Mistake, Stopped
from bmft.log import Log
from bmft.progress import Progress, make_plan, total_steps
from bmft.run import REPORT, open_run

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def undrawn():
    """The picture takes longer than such a run; the programs below and tests/test_log.py draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "draw_curves", lambda log: None)
        yield


def rows_of(workdir):
    """The rows of metrics.jsonl without their time."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert list(row)[-1] == "time"
        del row["time"]
    return rows


def checkpoints_of(workdir):
    return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (leaves, rows)."""
    workdir = tmp_path_factory.mktemp("whole")
    outcome = loop_toy.train(workdir, loop_toy.make_config())
    return loop_toy.leaves(outcome.state), rows_of(workdir)


def program(workdir, overrides=None, **options):
    """The toy as a program, started."""
    return subprocess.Popen(
        [sys.executable, "tests/loop_toy.py", workdir, json.dumps(overrides or {})]
        + [json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def same_as(whole, workdir):
    leaves, rows = whole
    assert json.loads((workdir / "leaves.json").read_text()) == leaves
    assert [list(row.items()) for row in rows_of(workdir)] == [list(row.items()) for row in rows]
    return True


# What a run is


def test_rows_are_means_by_weight_and_the_leaves_those_of_plain_steps(whole):
    leaves, rows = whole
    state, frozen = loop_toy.first_state(), loop_toy.make_frozen()
    expected, total, weight = [], 0.0, 0.0
    for number in range(40):
        state, metrics = loop_toy.step(state, frozen, loop_toy.Batches().at(number))
        total += float(metrics["loss"]) * float(metrics["weight"])
        weight += float(metrics["weight"])
        if number % 5 == 4:
            expected.append((number + 1, total / weight))
            total, weight = 0.0, 0.0
    train = [row for row in rows if row["split"] == "train"]
    assert [(row["step"], row["loss"]) for row in train] == expected
    assert list(train[0]) == ["step", "split", "loss", "grad_norm"]
    assert loop_toy.leaves(state) == leaves
    steps = {
        split: [row["step"] for row in rows if row["split"] == split]
        for split in ("validation", "test")
    }
    assert steps == {"validation": [10, 20, 30, 40], "test": [40]}


def test_outcome_and_report(tmp_path):
    outcome = loop_toy.train(tmp_path, loop_toy.make_config())
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= set(REPORT)
    assert outcome.step == int(outcome.state.step) == report["steps"] == 40
    rows = {row["split"]: row for row in rows_of(tmp_path)}  # the last of each
    for split in ("train", "validation", "test"):
        assert {"step": 40, "split": split, **outcome.metrics[split]} == rows[split]
    assert report["metrics"] == outcome.metrics
    assert report["examples_per_second"] > 0
    assert report["tokens_per_second"] > 0
    assert report["peak_memory_bytes"] > 50e6
    assert 0 <= report["compile_seconds"] < report["wall_seconds"]  # 0: this process had the step
    assert checkpoints_of(tmp_path) == [30, 40]


def test_compilations_are_counted(tmp_path):
    def session(sizes):
        new = jax.jit(lambda *arguments: loop_toy.plain_step(*arguments))
        batches = loop_toy.Batches(sizes)
        workdir = tmp_path / str(sizes)
        outcome = loop_toy.train(workdir, loop_toy.make_config(), step=new, batches=batches)
        return outcome.report["compilations"]

    one = session((8,))
    assert one >= 1
    assert session((8, 4)) == one + 1
    assert session((8, 4, 6)) == one + 2


def test_the_last_row_is_written_where_steps_end_between_rows(tmp_path):
    loop_toy.train(tmp_path, loop_toy.make_config(**{"train.steps": 7}))
    assert [row["step"] for row in rows_of(tmp_path) if row["split"] == "train"] == [5, 7]
    assert [row["step"] for row in rows_of(tmp_path) if row["split"] == "validation"] == [7]


def test_a_row_has_the_last_learning_rate_not_its_mean(tmp_path):

    def with_rate(state, frozen, batch):
        rate = jnp.asarray(state.step, jnp.float32)
        state, metrics = loop_toy.step(state, frozen, batch)
        return state, metrics | {"learning_rate": rate, "twice": 2 * metrics["loss"]}

    loop_toy.train(tmp_path, loop_toy.make_config(), step=with_rate)
    first = rows_of(tmp_path)[0]
    assert first["learning_rate"] == 4.0
    assert first["twice"] == pytest.approx(2 * first["loss"])


def test_metrics_of_a_step_are_fetched_while_the_next_one_runs():
    class Never:
        def requested(self):
            return False

    made = []

    def step(state, at):
        made.append(at)
        return state + 1, f"metrics {at}"

    seen = [(list(made), *pair) for pair in loop._steps(step, 0, 3, 6, Never())]
    assert seen == [
        ([3], 1, None),
        ([3, 4], 2, "metrics 3"),
        ([3, 4, 5], 3, "metrics 4"),
        ([3, 4, 5], 3, "metrics 5"),
    ]


def test_data_without_validation_or_test(tmp_path):
    outcome = loop_toy.train(tmp_path, loop_toy.make_config(), splits=())
    assert {row["split"] for row in rows_of(tmp_path)} == {"train"}
    assert outcome.step == 40
    assert outcome.report["best"] is None
    assert checkpoints_of(tmp_path) == [30, 40]
    with pytest.raises(Mistake, match=r"train\.early_stopping needs a validation split"):
        config = loop_toy.make_config(**{"train.early_stopping": 1})
        loop_toy.train(tmp_path / "other", config, splits=("test",))


# Killed


@pytest.mark.parametrize(
    ("overrides", "moments"),
    [
        ({}, ["seal 10", "evaluation 20", "seal 40"]),
        ({"checkpoint.every": 4}, ["step 6"]),  # saved between rows
    ],
)
def test_killed_at_chosen_moments(tmp_path, whole, overrides, moments):
    for moment in moments:
        status, _, err = finish(program(tmp_path, overrides, kill=moment))
        assert status == -signal.SIGKILL, err
        with open(tmp_path / "metrics.jsonl", "a") as file:  # a row that was being written
            file.write('{"step": 99, "split": "tr')
    status, _, err = finish(program(tmp_path, overrides))
    assert status == 0, err
    assert same_as(whole, tmp_path)


def test_killed_at_random_moments(tmp_path, whole):
    wait, kills = random.Random(0), 0
    while kills < 2:
        process = program(tmp_path, sleep=0.02)
        while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.02)
        time.sleep(wait.uniform(0, 0.6) if kills == 0 else wait.uniform(1.5, 4.0))
        process.kill()
        status, _, err = finish(process)
        kills += 1
        if status == 0:
            break
        assert status == -signal.SIGKILL, err
    status, _, err = finish(program(tmp_path))
    assert status == 0, err
    assert same_as(whole, tmp_path)


# SIGTERM


def terminating(function, when):
    """`function`, sending SIGTERM to this process before call number `when`."""
    calls = []

    def called(*arguments):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    return called


def terminating_evaluation(evaluate, when, batch):
    """`evaluate`, sending SIGTERM as its batch number `batch` begins, on call number `when`."""
    calls = []

    def called(state, frozen, split, stop):
        calls.append(1)
        if len(calls) != when:
            return evaluate(state, frozen, split, stop)
        return evaluate(state, frozen, split, terminating(stop, batch))

    return called


@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        ("step 1", 1),
        ("step 13", 13),
        ("step 15", 15),  # a row of the log is due
        ("step 20", 20),  # an evaluation is due
        ("step 40", 40),  # the last
        ("compilation", 1),
        ("evaluation 2 batch 1", 20),
        ("evaluation 2 batch 3", 20),
        ("evaluation 5 batch 2", 40),  # the test split
    ],
)
def test_terminated(tmp_path, whole, moment, saved):
    step, evaluate = loop_toy.step, loop_toy.assess
    words = moment.split()
    if words[0] == "step":
        step = terminating(step, int(words[1]))
    elif words[0] == "evaluation":
        evaluate = terminating_evaluation(evaluate, int(words[1]), int(words[3]))
    else:
        step = jax.jit(terminating(loop_toy.plain_step, 1))  # called once, to be traced
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"at step {saved} of 40, the state is saved in "):
        loop_toy.train(tmp_path, loop_toy.make_config(), step=step, evaluate=evaluate)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert checkpoints_of(tmp_path)[-1] == saved
    assert not (tmp_path / "report.json").exists()
    outcome = loop_toy.train(tmp_path, loop_toy.make_config())
    assert loop_toy.leaves(outcome.state) == whole[0]
    assert rows_of(tmp_path) == whole[1]


def test_terminated_again_and_again(tmp_path, whole):
    for when in (4, 1, 9, 6):
        with pytest.raises(Stopped):
            loop_toy.train(tmp_path, loop_toy.make_config(), step=terminating(loop_toy.step, when))
    outcome = loop_toy.train(tmp_path, loop_toy.make_config())
    assert loop_toy.leaves(outcome.state) == whole[0]
    assert rows_of(tmp_path) == whole[1]


def test_terminated_between_a_better_evaluation_and_the_next(tmp_path):
    """The evaluation a stop cut off finds the best state, whose arrays are saved already."""
    config = loop_toy.make_config(**{"checkpoint.every": 40, "checkpoint.keep": 1})
    values = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5}

    def evaluate(state, frozen, split, stop):
        return None if stop() else {"loss": values[int(state.step)]}

    with pytest.raises(Stopped, match="at step 20 "):
        loop_toy.train(tmp_path, config, step=terminating(loop_toy.step, 20), evaluate=evaluate)
    outcome = loop_toy.train(tmp_path, config, evaluate=evaluate)
    assert outcome.step == int(outcome.state.step) == 20
    assert checkpoints_of(tmp_path) == [20, 40]


def test_program_ends_with_status_75_then_0(tmp_path, whole):
    process = program(tmp_path, sleep=0.05)
    while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.02)
    time.sleep(1.0)
    process.terminate()
    status, _, err = finish(process)
    assert status == 75
    assert err.startswith(("stopped: at step ", "stopped: before the first step"))
    assert err.endswith("run the same command again to continue\n")
    assert len(err.splitlines()) == 1
    status, out, err = finish(program(tmp_path))
    assert (status, err) == (0, "")
    assert "step 40/40  test  loss " in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert same_as(whole, tmp_path)


def test_terminated_before_the_loop(tmp_path):
    process = program(tmp_path)
    while not (tmp_path / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    status, _, err = finish(process)
    assert status == 75, err


# Finished, longer, best, early


def test_a_finished_run_may_grow_but_not_shrink(tmp_path):
    loop_toy.train(tmp_path, loop_toy.make_config(**{"train.steps": 20}))
    before = rows_of(tmp_path)
    assert open_run(loop_toy.make_config(**{"train.steps": 20}), tmp_path, "toy", "toy").finished
    outcome = loop_toy.train(tmp_path, loop_toy.make_config(**{"train.steps": 30}))
    assert outcome.report["steps"] == 30
    rows = rows_of(tmp_path)
    assert rows[: len(before) - 1] == before[:-1]  # but the test split's, at the end
    assert [row["step"] for row in rows if row["split"] == "test"] == [30]
    with pytest.raises(Mistake, match=r"train\.steps: 30 != 20.*may only grow"):
        loop_toy.train(tmp_path, loop_toy.make_config(**{"train.steps": 20}))


def test_the_best_is_exported_and_patience_ends_a_run(tmp_path):
    values = {10: 0.2, 20: 0.7, 30: 0.7, 40: 0.6, 50: 0.9}

    def evaluate(state, frozen, split, stop):
        return {"accuracy": values[int(state.step)]}

    config = loop_toy.make_config(
        **{"train.steps": 100, "train.early_stopping": 2, "checkpoint.keep": 1}
    )
    arguments = {"evaluate": evaluate, "metric": ("accuracy", "max")}
    outcome = loop_toy.train(tmp_path, config, **arguments)
    assert outcome.step == int(outcome.state.step) == 20
    assert outcome.metrics["validation"] == outcome.metrics["test"] == {"accuracy": 0.7}
    assert outcome.report["steps"] == 40
    assert outcome.report["stopped_early"]
    assert outcome.report["best"] == {"metric": ["accuracy", "max"], "value": 0.7, "step": 20}
    assert checkpoints_of(tmp_path) == [20, 40]
    assert rows_of(tmp_path)[-1] == {"step": 20, "split": "test", "accuracy": 0.7}

    run = open_run(config, tmp_path, "toy", "toy")
    assert run.finished
    again, step = loop.exported(config, run, loop_toy.first_state(), fingerprint="toy")
    assert step == 20
    assert loop_toy.leaves(again) == loop_toy.leaves(outcome.state)

    last = loop_toy.make_config(
        **{"train.steps": 100, "train.early_stopping": 2, "export.best": False}
    )
    outcome = loop_toy.train(tmp_path, last, **arguments)
    assert outcome.step == 40
    assert outcome.metrics["validation"] == {"accuracy": 0.6}


def test_a_nan_is_never_the_best(tmp_path):
    values = {10: math.nan, 20: 0.7, 30: math.nan, 40: 0.6}

    def evaluate(state, frozen, split, stop):
        return {"pearson": values[int(state.step)]}

    outcome = loop_toy.train(
        tmp_path, loop_toy.make_config(), evaluate=evaluate, metric=("pearson", "max")
    )
    assert outcome.step == 20
    found = [row["pearson"] for row in rows_of(tmp_path) if row["split"] == "validation"]
    assert found == [None, 0.7, None, 0.6]


def test_another_metric_than_before_begins_a_new_search(tmp_path, capsys):
    with pytest.raises(Stopped):
        loop_toy.train(tmp_path, loop_toy.make_config(), step=terminating(loop_toy.step, 25))
    config = loop_toy.make_config(**{"eval.metric": "within"})
    outcome = loop_toy.train(tmp_path, config, metric=("within", "max"))
    assert "warning: the best checkpoint was by ['loss', 'min']" in capsys.readouterr().err
    assert outcome.report["best"]["metric"] == ["within", "max"]
    assert outcome.report["best"]["step"] > 20


def test_a_metric_that_is_not_there(tmp_path):
    with pytest.raises(Mistake, match=r"eval\.metric 'wihtin' is none of validation; .*'within'\?"):
        loop_toy.train(tmp_path, loop_toy.make_config(), metric=("wihtin", "max"))


# What goes wrong


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_number_that_is_not_finite(tmp_path, name):

    def poisoned(state, frozen, batch):
        number = int(state.step) + 1
        state, metrics = loop_toy.step(state, frozen, batch)
        if number == 20:  # where a row, an evaluation and a checkpoint are due
            metrics[name] = metrics[name] + jnp.inf
        return state, metrics

    expected = f"{name} is inf at step 20; the last good checkpoint is .*/checkpoints/10$"
    with pytest.raises(Mistake, match=expected):
        loop_toy.train(tmp_path, loop_toy.make_config(), step=poisoned)
    assert checkpoints_of(tmp_path) == [10]
    assert max(row["step"] for row in rows_of(tmp_path)) < 20


def test_leaves_without_gradient(tmp_path, capsys):

    def silent(places, until=1000):
        def called(state, frozen, batch):
            number = int(state.step)
            state, metrics = loop_toy.step(state, frozen, batch)
            norms = metrics["grad_norms"]
            return state, metrics | {
                "grad_norms": norms.at[np.array(places)].set(0) if number < until else norms
            }

        return called

    loop_toy.train(tmp_path / "a", loop_toy.make_config(), step=silent([2]))
    line = "warning: no gradient reached peft/layer/lora_a in the first 5 steps\n"
    assert capsys.readouterr().err == line
    loop_toy.train(tmp_path / "b", loop_toy.make_config(), step=silent([2, 3], until=4))
    assert capsys.readouterr().err == ""
    with pytest.raises(Mistake, match=r"any leaf of 'lora'.*peft/layer/lora_a, peft/layer/lora_b "):
        loop_toy.train(tmp_path / "c", loop_toy.make_config(), step=silent([0, 2, 3]))


def test_gradients_are_watched_across_sessions(tmp_path, capsys):

    def silent(state, frozen, batch):
        state, metrics = loop_toy.step(state, frozen, batch)
        return state, metrics | {"grad_norms": metrics["grad_norms"].at[2].set(0)}

    with pytest.raises(Stopped):
        loop_toy.train(tmp_path, loop_toy.make_config(), step=terminating(silent, 3))
    assert capsys.readouterr().err == ""
    loop_toy.train(tmp_path, loop_toy.make_config(), step=silent)
    assert "no gradient reached peft/layer/lora_a" in capsys.readouterr().err


def test_a_disk_that_takes_no_more(tmp_path, whole):
    with pytest.raises(Stopped):
        loop_toy.train(tmp_path, loop_toy.make_config(), step=terminating(loop_toy.step, 25))
    status, _, err = finish(program(tmp_path, file_size=3000))
    assert status == 2, err
    assert err == (
        f"error: cannot write {tmp_path}/checkpoints/30: File too large; the last good checkpoint "
        f"is {tmp_path}/checkpoints/25\n"
    )
    outcome = loop_toy.train(tmp_path, loop_toy.make_config())
    assert loop_toy.leaves(outcome.state) == whole[0]
    assert rows_of(tmp_path) == whole[1]


def test_what_is_being_saved_is_finished_when_a_step_raises(tmp_path):

    def broken(state, frozen, batch):
        if int(state.step) == 10:  # at once after a checkpoint was begun
            raise ZeroDivisionError("a fault")
        return loop_toy.step(state, frozen, batch)

    with pytest.raises(ZeroDivisionError):
        loop_toy.train(tmp_path, loop_toy.make_config(), step=broken)
    assert checkpoints_of(tmp_path) == [10]


def test_one_process_at_a_time(tmp_path):
    process = program(tmp_path, {"train.steps": 500}, sleep=0.05)
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(Mistake, match="another process is training in "):
        loop_toy.train(tmp_path, loop_toy.make_config(**{"train.steps": 500}))
    process.kill()
    finish(process)


# The plan


def test_plan():
    config = loop_toy.make_config(**{"eval.every": None, "train.steps": 300, "log.every": 7})
    plan = make_plan(config, 16, ("validation_matched", "validation_mismatched", "test"))
    assert (plan.evaluate_every, plan.save_every) == (60, 60)
    assert plan.validation == ("validation_matched", "validation_mismatched")
    assert plan.tests == ("test",)
    assert [plan.next_event(step) for step in (0, 7, 56, 60, 298)] == [7, 14, 60, 63, 300]
    assert not plan.evaluates(Progress(step=60, evaluated=60))
    assert plan.evaluates(Progress(step=60, evaluated=0))


def test_total_steps():
    assert total_steps(loop_toy.make_config(), 16) == 40
    epochs = {"train.steps": None, "train.epochs": 2.5}
    assert total_steps(loop_toy.make_config(**epochs), 16) == 40
    assert total_steps(loop_toy.make_config(**{**epochs, "train.epochs": 0.001}), 16) == 1
