"""Several processes: what makes a process one of them, and what they hold together.

Real ones take seconds to start: one test does with two of them what all others are cheap for.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import loop_toy
import pytest

from bmft import processes
from bmft.errors import Mistake, Stopped
from bmft.log import Log
from bmft.run import open_run

ROOT = pathlib.Path(__file__).parent.parent


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def two(workdir, **options):
    """A session of the toy by two processes: status, lines of stdout, lines of stderr."""
    command = [sys.executable, "-m", "bmft.launch", "--processes=2", "--", "tests/loop_toy.py"]
    done = subprocess.run(
        [*command, workdir, "{}", json.dumps(options)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # and one device each
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("run.sh: 2 proc")]
    return done.returncode, done.stdout.splitlines(), errors


def test_two_processes_stopped_killed_and_continued_by_one(tmp_path, monkeypatch):
    """SIGTERM for process 1, then SIGKILL for process 0 before its seal, then one process to the
    end: the numbers are those of one process alone."""
    monkeypatch.setattr(Log, "draw_curves", lambda log: None)
    loop_toy.train(tmp_path / "whole", loop_toy.make_config())

    together = tmp_path / "together"
    # JAX looks for the signal once a second: the steps are slow.
    status, out, errors = two(together, victim=1, terminate="step 3", sleep=0.1)
    assert status == 75, errors
    (line,) = errors  # of process 0 alone
    step = re.match("stopped: at step ([0-9]+) of 40, the state is saved in ", line)[1]
    assert 3 < int(step) < 30
    assert len([line for line in out if "  train  " in line]) == int(step) // 5
    manifest = json.loads((together / "checkpoints" / step / "manifest.json").read_text())
    folders = {name.split("/")[1] for name in manifest["content"]["files"]}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= folders  # both have written

    status, _, errors = two(together, kill="seal 30")
    (line,) = errors
    assert line.startswith("error: process 0, the coordinator, was lost (killed by SIGKILL)")
    assert status == 1
    assert not (together / "checkpoints" / "30" / "manifest.json").exists()

    loop_toy.train(together, loop_toy.make_config())
    one, other = rows_of(tmp_path / "whole"), rows_of(together)
    for row in (*one, *other):
        del row["time"]
    assert [row.keys() for row in one] == [row.keys() for row in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert b[name] == (a[name] if name == "split" else pytest.approx(a[name], rel=1e-5))


# What all processes must have in common


def others(monkeypatch, change):
    """Let there be a second process, which has `change(value)` where this one has a value."""
    monkeypatch.setattr(processes, "exchange", lambda value: [value, change(value)])
    monkeypatch.setattr(processes, "several", lambda: True)


def test_another_config_on_one_process_is_refused(tmp_path, monkeypatch):
    def change(value):
        return value | {"optim": value["optim"] | {"beta1": 0.5}} if value else value

    others(monkeypatch, change)
    expected = r"process 1 differs from process 0: optim.beta1: 0\.5 != 0\.9$"
    with pytest.raises(Mistake, match=expected):
        open_run(loop_toy.make_config(), tmp_path, "toy", "toy")
    assert not (tmp_path / "config.json").exists()
    others(monkeypatch, lambda value: value | {"base_fingerprint": "other"} if value else value)
    with pytest.raises(Mistake, match="base_fingerprint: 'other' != 'toy'"):
        open_run(loop_toy.make_config(), tmp_path, "toy", "toy")


def test_a_directory_that_only_the_first_sees_is_refused(tmp_path, monkeypatch):
    others(monkeypatch, lambda value: False if value is True else value)
    with pytest.raises(Mistake, match="process 1 does not see the .*config.json of process 0"):
        open_run(loop_toy.make_config(), tmp_path, "toy", "toy")


# How one that ends early tells the others


class Store:
    """The coordinator's, as far as it is used."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values.setdefault(key, value)

    def key_value_dir_get(self, prefix):
        return [pair for pair in self.values.items() if pair[0].startswith(prefix)]


class Ended(BaseException):
    """os._exit, which a test survives."""


@pytest.fixture
def join(monkeypatch):
    """join(index) -> a process of three; `.ended` has the status once it has left."""
    store, made = Store(), []

    def join(index):
        joint = processes._Joint(index, 3, store)
        made.append(joint)
        joint.ended = []

        def leave(status):
            joint.ended.append(status)
            raise Ended

        joint._go = leave
        return joint

    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # Ended, in the watch
    yield join
    for joint in made:
        joint._left.set()
        processes.atexit.unregister(joint._leave)


def run(monkeypatch, joint, raises):
    """What `joined` makes of a main that raises, in this process."""

    def main(argv):
        raise raises

    monkeypatch.setattr(processes, "_join", lambda: None)
    monkeypatch.setattr(processes, "_joint", joint)
    return processes.joined(main)([])


def test_a_mistake_of_all_is_printed_by_the_first(join, monkeypatch, capsys):
    mistake = Mistake("no such key")
    assert run(monkeypatch, join(2), mistake) == 2
    with pytest.raises(Mistake):
        run(monkeypatch, join(0), mistake)
    assert run(monkeypatch, join(1), mistake) == 2
    assert capsys.readouterr().err == ""  # the one that was raised is errors.command's to print


def test_a_mistake_of_one_ends_the_others(join, monkeypatch, capsys):
    first, second, third = map(join, range(3))
    assert run(monkeypatch, third, Mistake("no file\nhere")) == 2
    for joint in (first, second):
        joint._watch.join(timeout=20)
        assert joint.ended == [2]
    assert capsys.readouterr().err == "error: process 2: no file here\n"


def test_a_fault_of_one_ends_the_others(join, monkeypatch, capsys):
    first, second = join(0), join(1)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, second, ZeroDivisionError("a fault"))
    # What the collective says that the first one was in: the other one's fault comes before.
    assert run(monkeypatch, first, ValueError("Gloo all-reduce failed: Connection reset")) == 1
    assert capsys.readouterr().err == "error: process 1 ended: ZeroDivisionError: a fault\n"


def test_a_lost_process_is_not_taken_for_a_fault(join, monkeypatch):
    joint = join(0)
    with pytest.raises(ValueError, match="Gloo"):
        run(monkeypatch, joint, ValueError("Gloo all-reduce failed: Connection reset by peer"))
    assert joint.told() is None


def test_of_all_that_were_stopped_the_first_says_so(join, monkeypatch):
    assert run(monkeypatch, join(1), Stopped("at step 3")) == 75
    with pytest.raises(Stopped):
        run(monkeypatch, join(0), Stopped("at step 3"))


# Joining


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES must be set as well"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is no number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: the processes are numbered from 0 to 1"),
    ],
)
def test_variables_that_cannot_be(monkeypatch, variables, says):
    if len(variables) == 1 and "must be" not in says:
        usual = zip(processes.VARIABLES, ("localhost:1234", "2", "1"), strict=True)
        variables = dict(usual) | variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Mistake, match=says):
        processes._initialize()


def test_how_long_one_may_be_silent(monkeypatch):
    """Longer on one machine, where the launcher sees that a process has gone."""
    said = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: said.append(how))
    for name, value in zip(processes.VARIABLES, ("localhost:1234", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes._initialize()
    monkeypatch.setenv("BMFT_LOCAL_PROCESSES", "2")
    assert processes._initialize()
    assert [how["heartbeat_timeout_seconds"] for how in said] == [40, 900]


@pytest.fixture
def alone(monkeypatch):
    """What jax says where it detects no cluster."""

    def initialize(**how):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)


def test_mpi_that_jax_cannot_join_is_refused(alone, monkeypatch):
    """Each process would train by itself, into the same directory."""
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(Mistake, match="MPI started several processes, which JAX can join if"):
        processes._initialize()


def test_one_process_alone(alone, monkeypatch):
    assert processes._initialize() is False
    assert processes.joined(lambda argv: argv)(7) == 7
    assert (processes.index(), processes.several(), processes.exchange(3)) == (0, False, [3])
    monkeypatch.setenv("BMFT_LOCAL_PROCESSES", "1000")
    assert processes.cores() == 1
