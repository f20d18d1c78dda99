"""Several processes of one run: found, joined, compared, and told when one of them ends early.

    raise SystemExit(errors.command(processes.joined(main)))      # the last line of an experiment

`joined` asks JAX whether this process is one of several (a TPU slice, SLURM, Open MPI, Kubernetes,
or the variables below, which `run.sh --processes N` sets) and joins the others before anything
touches a device. SIGTERM is `errors.command`'s until then and JAX's preemption service's from then
on: whichever process gets it, all stop at the same step (bmft/loop.py).

A process that ends by a mistake or a fault says so before it goes, in the store of JAX's
coordinator, which is process 0. The others look there once a second, as whoever waits in a
collective cannot be told otherwise: they end with the same status, and process 0 prints the line.
A process that was killed says nothing. It is missed after `HEARTBEAT` seconds, and JAX aborts the
others; bmft/launch.py keeps the traces of that, says in a line who was lost, and ends those on its
own machine that JAX does not end.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import warnings

import jax

from bmft.config import difference
from bmft.errors import Mistake, Stopped

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of MPI's launchers, whether jax knows them or not
HEARTBEAT = 40  # seconds without a sign of life until a process counts as lost; jax's own: 100
# Of those on one machine bmft/launch.py sees at once that one has gone. Their only reason to be
# silent is that the machine is busy: at a load of 40 on two cores, 40 seconds were too few.
LOCAL_HEARTBEAT = 900
PATIENCE = 24 * 3600  # seconds to wait for a process that lives: one may load, or export, for long
FAREWELL = 10  # seconds that the coordinator stays, so that the others learn why it goes
# What a collective says when another process has gone.
LOST = re.compile(r"gloo|nccl|coordination service|heartbeat|connection (closed|reset)", re.I)


def joined(main):
    """`main(argv)`, but as one of several processes where there are several."""

    @functools.wraps(main)
    def run(argv):
        _end_with_launcher()
        _join()
        if _joint is None:
            return main(argv)
        try:
            return main(argv)
        except Stopped:
            if _joint.index == 0:
                raise
            return 75
        except Mistake as mistake:
            return _joint.fail(mistake, 2, str(mistake))
        except Exception as fault:
            if LOST.search(str(fault)) and not _joint.told():
                raise  # jax ends this process as soon as it knows who is lost
            return _joint.fail(fault, 1, f"{type(fault).__name__}: {fault}")

    return run


def index():
    """The number of this process, 0 where there is but one. Unlike jax's, it starts no device."""
    return _joint.index if _joint else 0


def several():
    """Is this process one of several?"""
    return _joint is not None


def cores():
    """How many of the machine's cores are for this process."""
    return max(1, os.cpu_count() // int(os.environ.get("BMFT_LOCAL_PROCESSES", 1)))


def exchange(value):
    """[the JSON value of each process], on every process, which all come here in the same order."""
    return _joint.exchange(value) if _joint else [value]


def from_first(make):
    """make() of process 0, a JSON value, on every process."""
    return exchange(make() if index() == 0 else None)[0]


def refuse_other(values):
    """Raises Mistake if a process has other values than the first; values: nested dicts of JSON."""
    first, *others = exchange(values)
    for number, other in enumerate(others, start=1):
        if differ := difference(other, first):
            raise Mistake(f"process {number} differs from process 0: {', '.join(differ)}")


class _Joint:
    """This process among the others. client: of the store they share."""

    def __init__(self, index, count, client):
        self.index, self.count, self.client = index, count, client
        self._exchanged = 0
        self._status = None  # to end with before the others do
        self._left = threading.Event()
        self._ending = threading.Lock()  # whoever has it has the last word
        self._watch = threading.Thread(target=self._look, name="watch", daemon=True)
        self._watch.start()
        atexit.register(self._leave)  # runs before jax's own, which waits for the others

    def exchange(self, value):
        self._exchanged += 1
        where = f"bmft/exchange/{self._exchanged}"
        self.client.key_value_set(f"{where}/{self.index}", json.dumps(value))
        self.client.wait_at_barrier(where, PATIENCE * 1000)
        texts = self.client.key_value_dir_get(f"{where}/")
        values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in texts}
        return [values[number] for number in range(self.count)]

    def told(self):
        """What the first process to end early said: {"process", "status", "line"}, or None."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for _, text in self.client.key_value_dir_get("bmft/ended/"):
                return json.loads(text)
        return None

    def fail(self, error, status, line):
        """End early: the status, or `error` raised where it is to be shown.

        Of mistakes that is process 0, of faults each process that met one by itself.
        """
        line = " ".join(line.split())
        about = {"process": self.index, "status": status, "line": line}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            self.client.key_value_set("bmft/ended/first", json.dumps(about))
        told = self.told() or about
        if not self._ending.acquire(blocking=False):
            self._watch.join()  # it ends the process
        self._status = told["status"]
        own = told["process"] == self.index or told["line"] == line
        if own and (status == 1 or self.index == 0 or os.environ.get("BMFT_TRACEBACK") == "1"):
            raise error
        if not own:
            self._say(told)
        return told["status"]

    def _say(self, told):
        if self.index == 0:
            how = "" if told["status"] == 2 else " ended"
            print(f"error: process {told['process']}{how}: {told['line']}", file=sys.stderr)

    def _look(self):
        """In a thread of its own: end this process after another that ended early."""
        while not self._left.wait(1.0):
            told = self.told()
            # It may be about to end by the same mistake. If not, it waits for one who has gone.
            if told and not self._left.wait(2.0) and self._ending.acquire(blocking=False):
                self._say(told)
                self._go(told["status"])

    def _leave(self):
        """At the end of Python."""
        self._left.set()
        self._watch.join()
        if self._status is not None:
            self._go(self._status)

    def _go(self, status):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"bmft/gone/{self.index}", "")
            until = time.monotonic() + (FAREWELL if self.index == 0 else 0)
            while time.monotonic() < until:
                if len(self.client.key_value_dir_get("bmft/gone/")) == self.count:
                    break
                time.sleep(0.1)
        os._exit(status)


_joint = None  # once joined


def _join():
    """Join the other processes, if this is one of several."""
    global _joint
    if not jax.distributed.is_initialized() and not _initialize():
        return
    from jax._src import distributed  # what is public of it has no store

    state = distributed.global_state
    if _joint is None and state.num_processes > 1:
        _joint = _Joint(state.process_id, state.num_processes, state.client)
    if index() != 0:
        _hush()


def _initialize():
    """jax.distributed.initialize as the surroundings ask for it; False: this process is alone."""
    local = "BMFT_LOCAL_PROCESSES" in os.environ
    heartbeat = LOCAL_HEARTBEAT if local else HEARTBEAT
    how = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": PATIENCE}
    if any(name in os.environ for name in VARIABLES[1:]):
        how |= _variables() | {"cluster_detection_method": "deactivate"}
    elif _by_mpi() and importlib.util.find_spec("mpi4py"):
        how["cluster_detection_method"] = "mpi4py"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if local:  # no proxy is in between
        jax.config.update("jax_check_proxy_envs", False)
    try:
        with warnings.catch_warnings():
            if "JOB_COMPLETION_INDEX" not in os.environ:  # a pod that is one of several has it
                warnings.filterwarnings("ignore", "Kubernetes environment")
            jax.distributed.initialize(**how)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        if _by_mpi():
            raise Mistake(
                "MPI started several processes, which JAX can join if the package mpi4py is there, "
                f"or if {', '.join(VARIABLES)} are set"
            ) from error
        return False
    return True


def _by_mpi():
    """Did MPI start several processes, in a way that JAX does not see by itself?"""
    several = any(os.environ.get(name, "1") != "1" for name in SIZES)
    return several and "OMPI_MCA_orte_hnp_uri" not in os.environ


def _variables():
    """The arguments for `initialize` that the environment names."""
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise Mistake(f"{', '.join(missing)} must be set as well: all of {', '.join(VARIABLES)}")
    address, *numbers = (os.environ[name] for name in VARIABLES)
    for name, number in zip(VARIABLES[1:], numbers, strict=True):
        if not number.isdecimal():
            raise Mistake(f"{name}={number!r} is no number")
    count, number = map(int, numbers)
    if number >= count:
        raise Mistake(f"JAX_PROCESS_ID={number}: the processes are numbered from 0 to {count - 1}")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def _end_with_launcher():
    """SIGTERM for this process when bmft/launch.py, which would have passed one on, is killed."""
    if sys.platform == "linux" and os.environ.get("BMFT_LAUNCHER") == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _hush():
    """What this process prints is what the first one prints: into a file, or nowhere."""
    sys.stdout.flush()
    output = os.environ.get("BMFT_OUTPUT", os.devnull)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.close(file)
