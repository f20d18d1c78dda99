"""PEFT's BOFT without its CUDA extension, without which PEFT makes every butterfly one factor."""

import torch
from peft.tuners.boft import layer


class Blocks:
    """What the extension computes: blocks [m, n, k, k] as diagonals [m, n k, n k]; its gradient."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*of_factor) for of_factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        m, n, k, _ = blocks.shape
        return [torch.einsum("mnknj->mnkj", grad.reshape(m, n, k, n, k)).contiguous()]


def install():
    layer._FBD_CUDA = Blocks
