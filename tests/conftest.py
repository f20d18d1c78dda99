"""Every test sees eight CPU devices, no network, a data cache of its own, and the programs that
earlier runs compiled.

What stands in the environment is set before jax is imported, and what tests start inherits it.
"""

import atexit
import os
import pathlib
import shutil
import sys
import tempfile
import time

COMPILED = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "").split()
    # Most of the time goes into compiling tiny programs, which run once. To cut each into parts for
    # several threads took half as long again.
    flags += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_force_host_platform_device_count=8"])
os.environ["HF_HUB_OFFLINE"] = "1"

if "BMFT_TESTS" not in os.environ:  # the workers of pytest-xdist share the first process's folder
    os.environ["BMFT_TESTS"] = folder = tempfile.mkdtemp(prefix="bmft-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for entry in COMPILED.glob("*"):  # jax itself never removes any
        if time.time() - entry.stat().st_mtime > 3 * 24 * 3600:
            entry.unlink(missing_ok=True)
os.environ["BMFT_CACHE"] = os.path.join(os.environ["BMFT_TESTS"], "cache")


def pytest_collection_finish():
    """Compiling is most of the time: a second run of test_methods.py takes a quarter of the first.

    In this process alone: tests kill others, or fill their disk, and half an entry is no entry.
    """
    if "jax" in sys.modules:
        from jax.experimental.compilation_cache import compilation_cache

        jax = sys.modules["jax"]
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()
