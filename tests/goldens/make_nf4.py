"""Kernels as bitsandbytes quantizes them, for tests/test_quantize.py.

    python tests/goldens/make_nf4.py        with bitsandbytes 0.50.2 and torch 2.13

It is no requirement of ours; `pip install --no-deps --target DIR bitsandbytes` and DIR on
PYTHONPATH is enough. Every case is a weight [out, in] of torch's linear layer.

The 8-bit codes are those of its plain definition, the nearest numbers of the map. Its quick kernel
for CPUs looks them up in a table of 65,536 places and misses by one in 2 of 1,000 normal numbers.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

FILE = Path(__file__).with_name("nf4.npz")


def kernels():
    """{name: float16 [out, in]}: a usual one, one with more than one group of absmax, of which the
    last is no whole one, and one with outliers, zeros and blocks of one sign."""
    rng = np.random.default_rng(0)
    odd = rng.normal(0, 0.02, (6, 128))
    odd[0, :64], odd[1], odd[2, 3], odd[3, 64:] = 0, abs(odd[1]), 9.0, 0.5
    made = {
        "plain": rng.normal(0, 0.05, (24, 64)),
        "groups": rng.standard_t(4, (17, 1024)) * 0.03,
        "odd": odd,
    }
    return {name: array.astype(np.float16) for name, array in made.items()}


def main():
    stored = {}
    for name, kernel in kernels().items():
        weight = torch.from_numpy(kernel.astype(np.float32))
        how = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
        codes, state = functional.quantize_4bit(weight, **how)
        absmax = functional.quantize_4bit(weight, **how | {"compress_statistics": False})[1].absmax
        nearest = torch.ops.bitsandbytes.quantize_blockwise.default.redispatch
        plain = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
        state.absmax, _ = nearest(plain, absmax - state.offset, state.state2.code, 256)
        stored |= {
            f"{name}/kernel": kernel,
            f"{name}/codes": codes.numpy().ravel(),
            f"{name}/absmax": state.absmax.numpy(),
            f"{name}/scale": state.state2.absmax.numpy(),
            f"{name}/offset": state.offset.numpy(),
            f"{name}/values": functional.dequantize_4bit(codes, state).numpy(),
        }
    stored["nf4"], stored["dynamic"] = state.code.numpy(), state.state2.code.numpy()
    np.savez_compressed(FILE, **stored)
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    main()
