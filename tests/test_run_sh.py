"""run.sh: what it builds and when, and that it hands over arguments, folder, signals and status.

Most of it runs with a Python that only notes how it was called, so nothing is installed.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
USAGE = "usage: run.sh [--processes N] [--retries N] SCRIPT.py ARGS | run.sh [...] -m MODULE ARGS"
BUILDS = ("cuda12", "cuda13", "tpu", "dev")

# Notes its arguments; `-m venv DIR` makes DIR/bin/python of it, as the real one would.
PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
  *--version*) echo Python 3.12.0 ;;
  *"-m venv"*)
    for folder in "$@"; do :; done
    rm -rf "$folder" && mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python" ;;
  *"-m pip"*) exit "${PIP_STATUS:-0}" ;;
esac
"""


class House:
    """A copy of run.sh with empty requirements, in a folder of its own."""

    def __init__(self, folder):
        self.root, self.bin, self.calls = folder / "the house", folder / "bin", folder / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "run.sh", self.root)
        for name in ("requirements.txt", *(f"requirements-{build}.txt" for build in BUILDS)):
            (self.root / name).write_text("# nothing\n")
        self.program("python3.13", PYTHON)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls)}

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *argv, cwd=None, **environment):
        """Status, lines of stderr, and the calls of Python that this run made."""
        self.calls.write_text("")
        result = subprocess.run(
            ["bash", str(self.root / "run.sh"), *argv],
            cwd=cwd or self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.stdout = result.stdout
        return result.returncode, result.stderr.splitlines(), self.calls.read_text().splitlines()


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def installed(calls):
    """The requirements files of each call of pip."""
    return [
        [pathlib.Path(word).name for word in call.split() if word.endswith(".txt")]
        for call in calls
        if "-m pip install" in call
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], f"no script; {USAGE}"),
        (["-c", "print(1)"], "no script; usage: "),
        (["-m"], "no module; usage: "),
        (["experiments/none.py"], "no script 'experiments/none.py', neither here nor in "),
        (["--retries=3"], "no script; usage: "),
        (["--processes", "two", "a.py"], "--processes takes a number, not 'two'; usage: "),
        (["--retries"], "--retries takes a number, not ''; usage: "),
    ],
)
def test_wrong_usage(house, argv, says):
    status, errors, calls = house.run(*argv)
    assert (status, len(errors), calls) == (2, 1, [])
    assert errors[0].startswith(f"error: {says}")


def test_help(house):
    assert house.run("--help")[0] == 0
    assert house.stdout == USAGE + "\n"


def test_no_suitable_python(house):
    house.program("old", "#!/bin/sh\nexit 1\n")
    status, errors, _ = house.run("-m", "bmft.predict", PYTHON=str(house.bin / "old"))
    assert (status, len(errors)) == (2, 1)
    assert "no Python 3.11 to 3.13 with venv" in errors[0] and str(house.bin / "old") in errors[0]


def test_builds_once_and_again_when_a_requirements_file_changes(house):
    status, errors, calls = house.run("-m", "module", "--flag=a b")
    assert status == 0 and installed(calls) == [["requirements.txt"]]
    assert errors[0].startswith("run.sh: building .venv: Python 3.12.0, JAX for cpu")
    assert calls[-1] == "-m module --flag=a b"

    assert house.run("-m", "module") == (0, [], ["-m module"])

    (house.root / "requirements.txt").write_text("# something else\n")
    _, errors, calls = house.run("-m", "module")
    assert "building .venv" in errors[0] and installed(calls) == [["requirements.txt"]]

    (house.root / "requirements-cuda12.txt").write_text("# not of this machine\n")
    assert house.run("-m", "module")[2] == ["-m module"]


def test_a_failed_or_interrupted_build_begins_anew(house):
    status, errors, calls = house.run("-m", "module", PIP_STATUS="1")
    assert (status, errors[-1]) == (1, "error: pip could not install requirements.txt")
    assert "-m module" not in calls
    status, errors, calls = house.run("-m", "module")
    assert status == 0 and "building .venv" in errors[0] and calls[-1] == "-m module"

    (house.root / ".venv" / "bin" / "python").unlink()
    assert "building .venv" in house.run("-m", "module")[1][0]


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        (["--processes", "2", "--retries=3"], {}, "--processes=2 --retries=3 "),
        ([], {"SLURM_PROCID": "0"}, ""),
        ([], {"JAX_PROCESS_ID": "1"}, ""),
    ],
)
def test_several_processes_and_new_starts_are_watched_over(house, options, given, says):
    _, _, calls = house.run(*options, "-m", "module", "--processes=9", **given)
    assert calls[-1] == f"-m bmft.launch {says}-- -m module --processes=9"


@pytest.mark.parametrize("module", ["pytest", "ruff"])
def test_tests_and_lint_get_what_they_need(house, module):
    house.run("-m", "module")
    status, errors, calls = house.run("-m", module, "x")
    assert (status, errors) == (0, ["run.sh: installing requirements-dev.txt"])
    assert installed(calls) == [["requirements-dev.txt"]] and calls[-1] == f"-m {module} x"
    assert house.run("-m", module)[1] == []
    (house.root / "requirements-dev.txt").write_text("# something else\n")
    assert house.run("-m", "module")[1] == []
    assert house.run("-m", module)[1] == ["run.sh: installing requirements-dev.txt"]


@pytest.mark.parametrize(
    ("prints", "build"),
    [
        ("| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4     |", "cuda12"),
        ("| NVIDIA-SMI 580.65  Driver Version: 580.65  CUDA Version: 13.0     |", "cuda13"),
        ("| NVIDIA-SMI 595.10  KMD Version: 595.10  CUDA UMD Version: 13.2    |", "cuda13"),
        ("| NVIDIA-SMI 470.82  Driver Version: 470.82  CUDA Version: 11.4     |", "cpu"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver", "cpu"),
    ],
)
def test_the_driver_decides_on_the_build_of_jax(house, prints, build):
    house.program("nvidia-smi", f'#!/bin/sh\necho "head"\necho "{prints}"\n')
    _, errors, calls = house.run("-m", "module")
    assert any(f"JAX for {build};" in line for line in errors)
    extra = [] if build == "cpu" else [f"requirements-{build}.txt"]
    assert installed(calls) == [["requirements.txt", *extra]]
    house.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    rebuilt = installed(house.run("-m", "module")[2])
    assert rebuilt == ([] if build == "cpu" else [["requirements.txt"]])


def test_a_script_is_found_here_or_in_the_repository(house, tmp_path):
    (house.root / "experiments").mkdir()
    (house.root / "experiments" / "a.py").write_text("")
    _, _, calls = house.run("experiments/a.py", "x", cwd=tmp_path)
    assert calls[-1] == f"{house.root}/experiments/a.py x"
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "a.py").write_text("")
    assert house.run("experiments/a.py", cwd=tmp_path)[2] == ["experiments/a.py"]


def test_with_a_real_python(house, tmp_path):
    """A real .venv: modules of the repository from any folder, the exit status, a signal."""
    (house.bin / "python3.13").unlink()
    (house.root / "own.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "if sys.argv[1:] == ['wait']:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "    pathlib.Path('ready').touch()\n"
        "    time.sleep(30)\n"
        "print(sys.argv[1:], os.getcwd(), sys.prefix)\n"
        "sys.exit(3)\n"
    )
    python = {"PYTHON": sys.executable, "PYTHONPATH": "elsewhere"}
    status, errors, _ = house.run("-m", "own", "a b", cwd=tmp_path, **python)
    assert (status, len(errors)) == (3, 3), errors
    assert house.stdout == f"{['a b']} {tmp_path} {house.root}/.venv\n"

    command = ["bash", str(house.root / "run.sh"), "-m", "own", "wait"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | house.environment)
    try:
        while not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    finally:
        process.kill()
