"""A run of several processes that is killed again and again, against one that is not.

    ./run.sh benchmarks/kills.py [--kills=25] [--processes=2] [--seed=0] [--output=FILE.json]

The toy of tests/loop_toy.py (dropout, evaluation, checkpoints every `EVERY` steps), started by
run.sh's own launcher. A kill is SIGKILL, half of the time at a random moment, otherwise while
checkpoint files are being written (the newest has no manifest yet); of a random process, every
fifth time of the launcher itself, with which the processes end by SIGTERM. Then the same command is
started again. In the end state and rows must be those of the run that was left alone, to the bit,
and no kill may have cost more than the steps of an interval, and those made while its checkpoint
was being written: else the status is 1.

    lost          steps that a restart makes again: those since the newest complete checkpoint
    of_a_write    of these, what was made since a checkpoint was begun that is not complete
    seconds       from the kill until the last process has ended

A session may end by itself, where the machine is so busy that a process gives no sign of life for
`processes.HEARTBEAT` seconds. That is a loss like any other (victim: "itself"), but no kill.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
EVERY, STEPS = 10, 1000
OVERRIDES = {"train.steps": STEPS, "checkpoint.every": EVERY, "eval.every": 40, "log.every": 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="kills.json")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="bmft-kills-") as folder:
        whole, killed = pathlib.Path(folder, "whole"), pathlib.Path(folder, "killed")
        finish(start(whole, options.processes, 0.0))
        losses = []
        while (made := sum(one["victim"] != "itself" for one in losses)) < options.kills:
            losses.append(kill(killed, options.processes, chance, made % 5 == 4))
            print(losses[-1], flush=True)
        finish(start(killed, options.processes, 0.0))
        same = {
            "leaves": (whole / "leaves.json").read_text() == (killed / "leaves.json").read_text(),
            "rows": rows(whole) == rows(killed),
        }
    result = {
        "kills": made,
        "ended_by_themselves": len(losses) - made,
        "in_checkpoint_writes": sum(one["writing"] for one in losses),
        "of_the_coordinator": sum(one["victim"] == 0 for one in losses),
        "checkpoint_every": EVERY,
        "most_steps_lost": max(one["lost"] for one in losses),
        "most_but_of_a_write": max(one["lost"] - one["of_a_write"] for one in losses),
        "most_seconds": max(one["seconds"] for one in losses),
        "same": same,
    }
    text = json.dumps(result | {"each": losses}, indent=2)
    pathlib.Path(options.output).write_text(text + "\n")
    print()
    for name, value in result.items():
        print(f"{name:22} {value}")
    return 0 if all(same.values()) and result["most_but_of_a_write"] <= EVERY else 1


def start(workdir, count, sleep):
    """The toy, started: the launcher's process. sleep: seconds a step takes longer."""
    toy = [str(ROOT / "tests" / "loop_toy.py"), str(workdir), json.dumps(OVERRIDES)]
    return subprocess.Popen(
        [sys.executable, "-m", "bmft.launch", f"--processes={count}", "--", *toy]
        + [json.dumps({"sleep": sleep})],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}: {errors}")


def kill(workdir, count, chance, launcher):
    """One session that is killed: what, when, and what it cost. launcher: that is the victim."""
    before, process = step_reached(workdir), start(workdir, count, 0.05)
    writing, delay = chance.random() < 0.5, chance.uniform(0.0, 3.0)
    children = []
    while step_reached(workdir) <= before or len(children) < count:  # it makes new steps
        children = children_of(process.pid)
        if process.poll() is not None:
            return ended(workdir, process, [], "itself", time.monotonic())
        time.sleep(0.02)
    time.sleep(delay)
    until = time.monotonic() + 20
    while writing and complete(workdir) == begun(workdir) and time.monotonic() < until:
        time.sleep(0.001)
    victim = "launcher" if launcher else chance.randrange(count)
    since = time.monotonic()
    os.kill(process.pid if launcher else children[victim], signal.SIGKILL)
    return ended(workdir, process, children, victim, since)


def ended(workdir, process, children, victim, since):
    """What there is to say of a session once all its processes have ended."""
    is_writing = complete(workdir) != begun(workdir)
    _, errors = process.communicate()
    if process.returncode not in (1, -signal.SIGKILL):
        raise SystemExit(f"status {process.returncode}: {errors}")
    while any(is_alive(child) for child in children):
        time.sleep(0.02)
    reached = step_reached(workdir)
    return {
        "victim": victim,
        "writing": is_writing,
        "step": reached,
        "lost": reached - complete(workdir),
        "of_a_write": reached - begun(workdir) if begun(workdir) > complete(workdir) else 0,
        "seconds": round(time.monotonic() - since, 1),
        "says": errors.splitlines()[-1] if errors else "",
    }


def children_of(pid):
    """Process ids in the order they were started in."""
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(map(int, text.read_text().split())) if text.exists() else []


def is_alive(pid):
    """A zombie is not: its parent was killed."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def step_reached(workdir):
    """The last step in metrics.jsonl; a row that was being written does not count."""
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line), default=0)


def begun(workdir):
    """The newest checkpoint that something was written of."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def complete(workdir):
    """The newest complete checkpoint."""
    manifests = (workdir / "checkpoints").glob("*/manifest.json")
    return max((int(path.parent.name) for path in manifests), default=0)


if __name__ == "__main__":
    sys.exit(main())
