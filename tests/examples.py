"""Examples of different lengths as batches: packed into one row, and one a row."""

import numpy as np


def tokens(lengths, vocabulary, types, seed=0):
    """[(ids, token types)] of random examples; ids 0 to 3 are left to special tokens."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(4, vocabulary, n).tolist(), np.sort(rng.integers(0, types or 1, n)).tolist())
        for n in lengths
    ]


def padded(examples, pad=0):
    """What transformers takes: input_ids, attention_mask, token_type_ids, int64 [n, longest]."""
    shape = len(examples), max(len(ids) for ids, _ in examples)
    batch = {"input_ids": np.full(shape, pad), "attention_mask": np.zeros(shape, int)}
    batch["token_type_ids"] = np.zeros(shape, int)
    for i, (ids, types) in enumerate(examples):
        batch["input_ids"][i, : len(ids)] = ids
        batch["token_type_ids"][i, : len(ids)] = types
        batch["attention_mask"][i, : len(ids)] = 1
    return batch


def packed(examples, padding=3, virtual=()):
    """Our batch with all examples in one row; its logits are [1, n, outputs]. virtual: ids of the
    virtual tokens before each example."""
    examples = [([*virtual, *ids], [0] * len(virtual) + types) for ids, types in examples]
    lengths = [len(ids) for ids, _ in examples]
    end = [0] * padding
    arrays = {
        "input_ids": [sum((ids for ids, _ in examples), []) + end],
        "segments": [sum(([i + 1] * n for i, n in enumerate(lengths)), []) + end],
        "positions": [sum((list(range(n)) for n in lengths), []) + end],
        "token_types": [sum((types for _, types in examples), []) + end],
        "first": [np.cumsum([0, *lengths[:-1]])],
    }
    return {name: np.asarray(array, np.int32) for name, array in arrays.items()}


def both(examples, virtual=()):
    """Our batch with all examples in the first row, and then each in a row of its own."""
    together = packed(examples, virtual=virtual)
    slots, width = together["first"].shape[1], together["input_ids"].shape[1]
    batch = {name: [array[0]] for name, array in together.items()}
    for example in examples:
        padding = width - len(virtual) - len(example[0])
        for name, array in packed([example], padding, virtual).items():
            batch[name].append(np.pad(array[0], (0, slots - 1 if name == "first" else 0)))
    return {name: np.stack(arrays) for name, arrays in batch.items()}


def of_both(logits):
    """The logits [n, outputs] of `both`, packed and one a row."""
    return logits[0], logits[1:, 0]
