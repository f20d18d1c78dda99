"""What run.sh says and how it ends, whatever becomes of the processes it watches over.

They are small programs here, which import nothing and end as real ones do; the traces are jax's.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What the process that is left writes when another one is lost (jax 0.10.2, paths cut short).
TRACES = {
    "process 1 was lost (no sign of life)": """\
E1122 17:41:04.926838   15134 coordination_service.cc:1549] Use error polling to propagate the \
following error to all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending \
heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error, to debug further.
F1122 17:41:04.927777   15145 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy
*** Check failure stack trace: ***
    @     0x7fe394b40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
""",
    "process 3 was lost (no sign of life)": """\
Traceback (most recent call last):
  File "loop.py", line 21, in step
ValueError: UNKNOWN: Gloo all-reduce failed: Connection reset by peer
E1122 17:42:00.679489   15810 coordination_service.cc:1520] Shutdown barrier in coordination \
service has failed:
INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 3 heartbeat timeout.
""",
    "process 0, the coordinator, was lost": """\
F1122 17:41:30.246270   15580 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. \
Either the leader task was preempted/died/restarted unexpectedly.
*** Check failure stack trace: ***
""",
    "process 0, the coordinator, was lost;": """\
F1122 21:32:56.422529    3374 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
*** Check failure stack trace: ***
""",
    "not all processes came": """\
F1122 17:49:37.803460   17123 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/RegisterTask
*** Check failure stack trace: ***
""",
}
SECOND_FAILS = "if me: print('error: no file', file=sys.stderr); sys.exit(2)"
BEGIN = "import os, signal, sys, time\nme = int(os.environ.get('JAX_PROCESS_ID', 0))\n"


def launch(program, *options, traces=""):
    """Status, lines of stdout and of stderr, seconds."""
    since = time.monotonic()
    process = start(program, *options, traces=traces)
    out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if " processes; what all but" not in line]
    return process.returncode, out.splitlines(), lines, time.monotonic() - since


def start(program, *options, traces=""):
    return subprocess.Popen(
        [sys.executable, "-m", "bmft.launch", *options, "--", "-c", BEGIN + program],
        cwd=ROOT,
        env=os.environ | {"TRACES": traces},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_knows_the_others_and_the_first_is_shown():
    program = """
print(me, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_PLATFORMS"])
print("warning: from", me, file=sys.stderr)
"""
    status, out, err, _ = launch(program, "--processes=3")
    assert (status, out, err) == (0, ["0 3 cpu"], ["warning: from 0"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named_and_ends_the_others(victim, tmp_path):
    program = f"""
if me == {victim}:
    open({str(tmp_path / "dying")!r}, "w")
    os.kill(os.getpid(), signal.SIGKILL)
while not os.path.exists({str(tmp_path / "dying")!r}):
    time.sleep(0.02)
sys.stderr.write(os.environ["TRACES"])
sys.stderr.flush()
os.abort()
"""
    name = "process 0, the coordinator," if victim == 0 else "process 1"
    for traces in list(TRACES.values())[1:3]:
        (tmp_path / "dying").unlink(missing_ok=True)
        status, _, err, seconds = launch(program, "--processes=2", traces=traces)
        (line,) = err
        assert line.startswith(f"error: {name} was lost (killed by SIGKILL); the same command con")
        assert (status, seconds < 20) == (1, True)
        log = pathlib.Path(line.rpartition(" ")[2]) / f"{1 - victim}.log"
        assert log.read_text() == traces


@pytest.mark.parametrize("says", TRACES)
def test_one_that_was_lost_on_another_host_is_named(says):
    program = 'sys.stderr.write(os.environ["TRACES"]); sys.stderr.flush(); os.abort()'
    status, _, (line,), _ = launch(program, "--retries=1", traces=TRACES[says])
    assert status == 1
    assert line.startswith(f"error: {says}")


def test_of_two_that_were_left_the_first_to_end_tells_who_was_lost(tmp_path):
    """Process 0 does not answer, process 1 ends of it, and now process 0 misses process 1."""
    lost, coordinator = (TRACES[list(TRACES)[place]] for place in (0, 3))
    program = f"""
while not me and not os.path.exists({str(tmp_path / "ended")!r}):
    time.sleep(0.02)
sys.stderr.write({coordinator!r} if me else {lost!r})
sys.stderr.flush()
if me:
    os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "sleep 0.5; echo > '{tmp_path / "ended"}'")
os.abort()
"""
    status, _, (line,), _ = launch(program, "--processes=2")
    assert status == 1
    assert line.startswith("error: process 0, the coordinator, was lost; the same command con")


def test_those_that_do_not_end_are_killed(monkeypatch):
    from bmft import launch as launcher

    monkeypatch.setattr(launcher, "GRACE", 0.5)
    program = BEGIN + "time.sleep(0.2)\nif me: sys.exit(2)\ntime.sleep(60)"
    since = time.monotonic()
    assert launcher.main(["--processes=2", "--", "-c", program]) == 2
    assert time.monotonic() - since < 20


@pytest.mark.parametrize(
    ("program", "status", "says"),
    [
        ("print('error: wrong', file=sys.stderr); sys.exit(2)", 2, ["error: wrong"]),
        (
            "if me: print('error: no file', file=sys.stderr); sys.exit(2)",
            2,
            ["error: process 1: no file"],
        ),
        ("raise ValueError('a fault')", 1, ["ValueError: a fault"]),
        ("sys.exit(75 if me else 0)", 75, []),
    ],
)
def test_how_it_ends(program, status, says):
    ended, _, err, _ = launch(program, "--processes=2")
    assert ended == status
    assert err[-1:] == says


def test_what_a_library_logs_of_a_fault_it_caught_is_shown_in_the_end():
    program = """
import traceback
try:
    raise ValueError("caught")
except ValueError:
    traceback.print_exc()
print("not of it", file=sys.stderr)
print("warning: shown at once", file=sys.stderr)
"""
    status, _, err, _ = launch(program, "--retries=1")
    assert (status, err[0], err[-2:]) == (
        0,
        "warning: shown at once",
        ["ValueError: caught", "not of it"],
    )


def test_a_preempted_one_is_started_again(tmp_path):
    program = f"""
file = {str(tmp_path / "count")!r}
count = os.path.getsize(file) if os.path.exists(file) else 0
open(file, "a").write("x")
sys.exit(75 if count < 2 else 0)
"""
    status, _, err, _ = launch(program, "--retries=5")
    assert status == 0
    again = "run.sh: starting again after status 75, {} times at most"
    assert err == [again.format(5), again.format(4)]
    assert (tmp_path / "count").read_text() == "xxx"
    (tmp_path / "count").unlink()
    assert launch(program, "--retries=1")[0] == 75


def test_sigterm_is_passed_on(tmp_path):
    program = f"""
def stop(*_):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open({str(tmp_path)!r} + "/ready" + str(me), "w")
time.sleep(60)
"""
    process = start(program, "--processes=2")
    while not all((tmp_path / f"ready{number}").exists() for number in (0, 1)):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=20) == 75


def test_ctrl_c_is_for_good(tmp_path):
    program = f'open({str(tmp_path / "ready")!r}, "w"); time.sleep(60)'
    command = [sys.executable, "-m", "bmft.launch", "--retries=3", "--", "-c", BEGIN + program]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_wrong_numbers():
    for option, says in (("--processes=0", "0 is less than 1"), ("--retries=-1", "-1 is less th")):
        status, _, err, _ = launch("", option)
        assert status == 2
        assert re.match(f"error: {option.partition('=')[0]}={says}", err[0])
