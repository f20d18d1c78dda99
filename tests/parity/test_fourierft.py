"""FourierFT's entries are those that torch draws."""

import numpy as np
import pytest
import torch

from bmft.peft import fourierft


@pytest.mark.parametrize("size", [1, 2, 7, 576, 960, 100_000, 589_824])
@pytest.mark.parametrize("seed", [777, 0, 2**32 - 1, 2**32 + 3, -5])
def test_permutation(size, seed):
    want = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()
    whole = size <= 100_000
    for count in {1, min(size, 1000), size if whole else 1}:
        np.testing.assert_array_equal(fourierft.permutation(size, count, seed), want[:count])
