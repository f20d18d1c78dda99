"""Bytes of smollm2's frozen kernels on the device, quantized, over those of bfloat16.

    ./run.sh benchmarks/quantized_bytes.py [--output=FILE.json]

The dense kernels of the stack, as a run with LoRA loads them by model.quantize: all arrays that
stand for them, scales and offsets among them, by the bytes of each. Error: root mean square of what
they stand for less the kernel, over that of the kernel.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from language_speed import groups

from bmft import prepare, quantize, sharding, tree
from bmft.config import read
from bmft.models import weights


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="quantized_bytes.json")
    output = parser.parse_args().output
    sharding.use_all_cores(1)
    config = read([], default="configs/instruct_lora.py", groups=groups).config
    model, mesh = prepare.find_model(config, None), sharding.mesh(config)
    methods = prepare.find_methods(config, model)
    plain = tree.flatten(weights.load(model, jax.random.key(0)).params)
    rows = []
    print("scheme    kernels   numbers   MB in bfloat16   MB quantized   ratio   error")
    for how in quantize.SCHEMES:
        loaded = prepare.load(model, jax.random.key(0), mesh, methods, quantize=how)
        row = {"scheme": how} | measured(loaded.quant, plain)
        rows.append(row)
        sizes = f"{row['bfloat16'] / 1e6:16.1f} {row['bytes'] / 1e6:14.1f} {row['ratio']:7.3f}"
        counts = f"{row['kernels']:7} {row['numbers'] / 1e6:8.1f}M"
        print(f"{how:9} {counts} {sizes} {row['error']:7.4f}", flush=True)
    Path(output).write_text(json.dumps(rows, indent=2) + "\n")


def measured(quant, plain):
    """What is printed of a tree of quantized kernels, of which `plain` holds the numbers."""
    found = quantize.modules(quant)
    count = sum(plain[f"{path}/kernel"].size for path in found)
    size = sum(leaf.nbytes for leaves in found.values() for leaf in leaves.values())
    off = whole = 0.0
    for path, leaves in found.items():
        kernel = np.asarray(plain[f"{path}/kernel"])
        one = quantize.kernel({name: np.asarray(leaf) for name, leaf in leaves.items()})
        off += np.square(one - kernel).sum(dtype=np.float64)
        whole += np.square(kernel).sum(dtype=np.float64)
    kernels = sum(leaf.shape[0] for leaf in (plain[f"{path}/kernel"] for path in found))
    return {
        "kernels": kernels,
        "numbers": count,
        "bytes": size,
        "bfloat16": 2 * count,
        "ratio": size / (2 * count),
        "error": float(np.sqrt(off / whole)),
    }


if __name__ == "__main__":
    main()
