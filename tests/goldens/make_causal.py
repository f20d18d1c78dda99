"""Makes what tests/test_causal.py compares with: python tests/goldens/make_causal.py

Needs requirements-parity.txt. The logits, every third of them, that transformers computes in 32
bits with the tiny models of tests/tiny_causal.py, whose weights are drawn there.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

import tiny_causal  # noqa: E402


def logits(folder):
    """[tokens of all texts, v / 3]"""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        each = [model(torch.tensor([ids])).logits[0, :, ::3] for ids in tiny_causal.texts()]
    return torch.cat(each).numpy()


def main():
    arrays = {}
    for name in tiny_causal.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            arrays[name] = logits(tiny_causal.directory(pathlib.Path(folder), name))
    np.savez_compressed(FOLDER / "causal.npz", **arrays)


if __name__ == "__main__":
    main()
