"""What run.sh starts where there is something to watch over: processes of one run, or a new start.

    python -m bmft.launch [--processes N] [--retries N] -- SCRIPT ARGS | -m MODULE ARGS

With --processes: N processes on this machine's CPU, joined over loopback. Otherwise one, which may
be one of several on other hosts. What process 0 says is shown. What the others say, and whatever
C++ and Python write when a process is lost (pages, on every one that is left), goes into log files:
a line says which process it was. The first failure ends all. Status 75 is tried again, --retries
times; Ctrl-C, or a second SIGTERM, is not.

It imports no JAX: that takes seconds, and what it watches over may crash.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from bmft import errors
from bmft.errors import Mistake

PREEMPTED = 75
GRACE = 20  # seconds for the others to end by themselves, once one has ended early
CPP = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ |\*\*\* |\s+@ +0x|\[Gloo\] ")
CPP_NOTE = re.compile(r"W\d{4} .*preemption_notifier")
# Where the trace of a lost process begins, and what ends one.
TRACE = re.compile(r"[EF]\d{4} .*(coordination_service|client\.h)|\*\*\* |Traceback \(most recent")
OWN = re.compile("(warning|error|stopped): ")
# What a process says that has no word from the coordinator: it went, or does not answer in time.
COORDINATOR = ("Failed to send RPC to coordination service", "CoordinationService/Heartbeat")
MISSED = re.compile(r"stopped sending heartbeats\):\s*(\d+)|Task (\d+) heartbeat timeout")
NOT_ALL_CAME = "CoordinationService/RegisterTask"
CONTINUE = "the same command continues from the newest complete checkpoint"


def main(argv):
    parser = errors.Parser(prog="run.sh")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    if options.processes is not None and options.processes < 1:
        raise Mistake(f"--processes={options.processes} is less than 1")
    if options.retries < 0:
        raise Mistake(f"--retries={options.retries} is less than 0")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bmft-processes-"))
    status = None
    with _Signals() as signals:
        for left in range(options.retries, -1, -1):
            status = _Attempt(options.command, options.processes, folder, signals).run()
            if status != PREEMPTED or signals.final or not left:
                break
            _say(f"run.sh: starting again after status {PREEMPTED}, {left} times at most")
    if status in (0, 2, PREEMPTED):
        shutil.rmtree(folder, ignore_errors=True)
    return status


class _Signals:
    """Takes SIGTERM, for the processes to be told, and SIGINT, which the terminal sends to all."""

    def __enter__(self):
        self.terminated, self.interrupted = 0, False
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate),
            signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt),
        }
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _terminate(self, number, frame):
        self.terminated += 1

    def _interrupt(self, number, frame):
        self.interrupted = True

    @property
    def final(self):
        return self.interrupted or self.terminated > 1


class _Attempt:
    """The processes, from their start to the end of the last."""

    def __init__(self, command, count, folder, signals):
        self._signals, self._passed_on = signals, signals.terminated
        self._several = count is not None
        variables = _local(count) if self._several else [{}]
        self._children = [
            _Child(command, number, folder / f"{number}.log", variables[number])
            for number in range(count or 1)
        ]
        if (count or 1) > 1:
            _say(f"run.sh: {count} processes; what all but the first print is in {folder}")

    def run(self):
        """Wait for all; the status to end with."""
        first, deadline = None, None
        while any(child.running for child in self._children):
            self._pass_on()
            ended = [child for child in self._children if child.ended_badly]
            if ended and first is None:
                first = min(ended, key=lambda child: child.is_consequence)
                deadline = time.monotonic() + GRACE
                if first.status == PREEMPTED:  # if before it joined, the others wait for it
                    self._signal(signal.SIGTERM)
            if deadline and time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(0.05)
        for child in self._children:
            child.close()
        return self._verdict(first)

    def _pass_on(self):
        if self._signals.terminated > self._passed_on:
            self._passed_on = self._signals.terminated
            self._signal(signal.SIGTERM)

    def _signal(self, number):
        for child in self._children:
            if child.running:
                child.killed = child.killed or number == signal.SIGKILL
                child.process.send_signal(number)

    def _verdict(self, first):
        ended = [child for child in (first, *self._children) if child and child.ended_badly]
        first = min(ended, key=lambda child: child.is_consequence, default=None)  # by now known
        if self._signals.interrupted:
            return 130  # as a shell says
        if first is None:
            self._children[0].show_held()
            return 0
        statuses = {child.status for child in self._children if not child.killed}
        if statuses <= {0, PREEMPTED}:
            return PREEMPTED
        lost = self._lost(first)
        if lost:
            _say(f"error: {lost}; {CONTINUE}; traces in {first.log.parent}")
            return 1
        shown = self._children[0]
        shown.show_held()
        if shown is not first and not shown.said_error and not (shown.status or 0) > 0:
            _say(f"error: process {first.number}: {first.last_line()}")
        return first.status if first.status > 0 else 128 - first.status

    def _lost(self, first):
        """Which process was lost, in words, or None."""
        if first.is_consequence:
            return first.lost_peer()
        if self._several and first.status < 0:
            how = signal.Signals(-first.status).name
            return f"{_process(first.number)} was lost (killed by {how})"
        return None


class _Child:
    """A process, what it writes and how it ends."""

    def __init__(self, command, number, log, variables):
        self.number, self.log = number, log
        self.killed = self.said_error = False
        log.unlink(missing_ok=True)  # of the attempt before
        self._file = open(log, "ab", buffering=0)  # noqa: SIM115, closed by `close`
        self._held, self._in_trace = [], False
        shown = number == 0
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | _common(log) | variables,
            stdout=None if shown else self._file,
            stderr=subprocess.PIPE if shown else self._file,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        if shown:
            self._reader.start()

    @property
    def running(self):
        return self.process.poll() is None

    @property
    def status(self):
        """Its exit status, or less the signal that killed it: of SIGTERM 75, it came too early."""
        status = self.process.returncode
        return PREEMPTED if status == -signal.SIGTERM else status

    @property
    def ended_badly(self):
        return not self.running and self.status != 0 and not self.killed

    @property
    def is_consequence(self):
        """Did it end because another one had?"""
        return self.status == -signal.SIGABRT and self.lost_peer() is not None

    def close(self):
        if self._reader.is_alive():
            self._reader.join(5.0)  # a process of its own may still have the pipe
        self._file.close()

    def show_held(self):
        """Show what looked like the trace of a loss, as there was none."""
        sys.stderr.writelines(self._held)
        sys.stderr.flush()

    def lost_peer(self):
        """What the log says of another process that was lost, or None."""
        text = self.log.read_text(errors="replace")
        if found := MISSED.search(text):
            return f"{_process(int(found[1] or found[2]))} was lost (no sign of life)"
        if NOT_ALL_CAME in text:
            return "not all processes came within the time to start in"
        return f"{_process(0)} was lost" if any(word in text for word in COORDINATOR) else None

    def last_line(self):
        """The last that a process which is not shown said, of its own making."""
        text = self.log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not CPP.match(line)]
        said = [line for line in lines if line.startswith("error: ")]
        return (said or lines or [f"status {self.status}"])[-1].removeprefix("error: ")

    def _read(self):
        """Show what comes line by line, but for what may be the trace of a loss."""
        for raw in self.process.stderr:
            self._file.write(raw)
            line = raw.decode(errors="replace")
            if OWN.match(line):
                self._in_trace = False
            self._in_trace = self._in_trace or bool(TRACE.match(line))
            if self._in_trace:
                self._held.append(line)
            elif not CPP_NOTE.match(line):
                self.said_error = self.said_error or line.startswith("error: ")
                sys.stderr.write(line)
                sys.stderr.flush()


def _common(log):
    """Variables for every process."""
    return {
        "BMFT_OUTPUT": str(log),  # for what all print alike, where it is not the first of them
        "BMFT_LAUNCHER": str(os.getpid()),  # with which it ends
        "PYTHONUNBUFFERED": "1",  # what was printed is there, even if C++ aborts the process
    }


def _local(count):
    """Variables for each of `count` processes on this machine's CPU, joined over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "BMFT_LOCAL_PROCESSES": str(count),
        "no_grpc_proxy": "127.0.0.1",
    }
    return [common | {"JAX_PROCESS_ID": str(number)} for number in range(count)]


def _process(number):
    return f"process {number}" + (", the coordinator," if number == 0 else "")


def _say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(errors.command(main))
