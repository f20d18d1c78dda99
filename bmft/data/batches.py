"""Batches of packed rows, fixed in shape, each a function of (seed, step) alone.

    batches = Batches(encoded, labels, batch_size=32, row_length=64, seed=0, shuffle=True)
    batches.at(1234)        # whatever was asked before: resuming needs nothing but the step

R rows of T tokens, at most K examples a row:

    input_ids    int32 [R, T]     0 where nothing lies
    segments     int32 [R, T]     1..K, which example of the row a token belongs to; 0: none
    positions    int32 [R, T]     within the example
    token_types  int32 [R, T]
    first        int32 [R, K]     column of each example's first token; 0 for an empty slot
    labels       [R, K]           int32 classes or float32 numbers; 0 for an empty slot
    weights      float32 [R, K]   1 for an example, 0 for an empty slot
    index        int32 [R, K]     the example's number in the split; -1 for an empty slot

of a language model also

    targets      int32 [R, T]     the next token, if it is of the same segment and learned; or -1

An example of two sequences (`Encoded.second`) is two segments of one row, 2k - 1 and 2k, so that no
part of a batch, no device and no host has one of them alone.
"""

import numpy as np

from bmft.data import packing
from bmft.errors import Mistake

SAMPLE = 200  # steps to choose a row length by
MANY = 32  # row lengths to try for long examples
SLOWER = 0.0018  # a token costs more by this share for each token that its row has beyond 64


def row_length(value, longest, platform, *, lengths=None, batch_size=None, rows_multiple=1):
    """Tokens a row: `value` (of config.data.row_length), or a good choice if it is None.

    longest: tokens of the longest example. platform: of JAX, "cpu", "gpu" or "tpu". Without
    lengths: the smallest multiple of 32, at least 64, that holds the longest example on CPU; of 128
    elsewhere, the width of a TPU's matrix unit. With lengths (int [n], of the training split),
    batch_size and rows_multiple, on CPU: the multiple of 16 up to 256, or of long examples of 32 up
    to twice the longest, that makes a step cheapest. Where few rows are rounded up to the number of
    devices, that decides between 5 and 25 % padding.
    Raises Mistake if `value` is shorter than the longest example.
    """
    if value is not None and value < longest:
        raise Mistake(
            f"data.row_length={value} is shorter than the longest example, {longest} tokens; "
            "raise it, or cut examples by data.max_length"
        )
    if value is not None:
        return value
    unit, least = (32, 64) if platform == "cpu" else (128, 128)
    shortest = max(least, -(-longest // unit) * unit)
    if lengths is None or platform != "cpu":
        return shortest
    stride = max(1, len(lengths) // (SAMPLE * batch_size))
    sample = np.asarray(lengths)[::stride][: SAMPLE * batch_size]

    def cost(tokens):
        rows = packing.plan(sample, batch_size, tokens).rows
        rows = -(-rows // rows_multiple) * rows_multiple
        return rows * tokens * (1 + SLOWER * (tokens - 64))

    candidates = range(max(64, -(-longest // 16) * 16), 257, 16)
    if longest > 256:
        candidates = range(shortest, 2 * shortest + 1, max(unit, shortest // MANY // unit * unit))
    return min(candidates, key=cost)


class Batches:
    """The batches of one split, for training (shuffle=True) or one pass over it.

    encoded: `text.Encoded`. labels: int or float [n], None where there are none to learn from.
    batch_size: examples a step; a last step may hold fewer. rows_multiple: the number of rows is a
    multiple of this (devices x parts of a batch). put: what `at` returns is put(arrays).
    share: (numbers, count); the arrays hold these of `count` equal parts of the rows, those of this
    host. What lies where depends on neither rows_multiple nor share.

    examples, steps_per_epoch, tokens_per_step (real tokens, mean) and padding_share (of the first
    epoch's tokens) are what logs and reports need.
    """

    def __init__(
        self,
        encoded,
        labels=None,
        *,
        batch_size,
        row_length,
        seed=0,
        shuffle=False,
        rows_multiple=1,
        put=lambda arrays: arrays,
        share=((0,), 1),
    ):
        self.examples = len(encoded.offsets) - 1
        if rows_multiple % share[1]:
            raise ValueError(f"{rows_multiple} rows at a time are not {share[1]} equal parts")
        labels = np.zeros(self.examples, np.int32) if labels is None else np.asarray(labels)
        if labels.shape != (self.examples,):
            raise ValueError(f"labels {labels.shape} of {self.examples} examples")
        self._encoded, self._lengths = encoded, encoded.lengths
        self._labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)
        self._row_length, self._multiple = row_length, rows_multiple
        self._put, self._share = put, share
        self._plan = lambda epoch, slots: packing.plan(
            self._lengths, batch_size, row_length, seed, epoch, shuffle, slots
        )
        self._shuffle = shuffle
        self._first = self._plan(0, None)
        self._kept = (0, self._first)  # the last epoch asked for
        self.steps_per_epoch = self._first.steps
        tokens = int(encoded.offsets[-1])
        self.tokens_per_step = tokens / self.steps_per_epoch
        rows = self._rows(self._first)
        self.padding_share = 1 - tokens / (self.steps_per_epoch * rows * row_length)

    def __len__(self):
        """Steps of one pass."""
        return self.steps_per_epoch

    def __iter__(self):
        """One pass."""
        return map(self.at, range(self.steps_per_epoch))

    def at(self, step):
        """put(the arrays) of `step`, counted from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        plan = self._epoch(epoch if self._shuffle else 0)
        here = slice(plan.starts[step], plan.starts[step + 1])
        places = (array[here] for array in (plan.order, plan.row, plan.slot, plan.column))
        return self._put(self._arrays(*places, self._rows(plan)))

    def _epoch(self, epoch):
        if self._kept[0] != epoch:
            # A row takes no more examples than in epoch 0, so that K is the same all along.
            plan = self._plan(epoch, self._first.slots) if epoch else self._first
            self._kept = (epoch, plan)
        return self._kept[1]

    def _rows(self, plan):
        """R of an epoch: epoch 0's, or more if it needs more. No other epoch matters, so that a
        resumed run sees the same shapes."""
        rows = max(plan.rows, self._first.rows)
        return -(-rows // self._multiple) * self._multiple

    def _arrays(self, examples, row, slot, column, rows):
        """The arrays of this host, of `examples` that lie at (row, slot, column) of `rows` rows."""
        numbers, count = self._share
        each, rows = rows // count, rows // count * len(numbers)
        place = np.full(count, -1)  # of a part, among those that are here
        place[list(numbers)] = range(len(numbers))
        part, mine = place[row // each], place[row // each] >= 0
        row = part * each + row % each
        examples, row, slot, column = (x[mine] for x in (examples, row, slot, column))
        shape, slots = (rows, self._row_length), (rows, self._first.slots)

        lengths = self._lengths[examples]
        ends = np.cumsum(lengths)
        position = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        source = np.repeat(self._encoded.offsets[examples], lengths) + position
        target = np.repeat(row.astype(np.int64) * self._row_length + column, lengths) + position
        segment = np.repeat(slot + 1, lengths)
        if self._encoded.second is not None:
            first_part = np.repeat(self._encoded.second[examples], lengths)
            is_second = position >= first_part
            segment, position = 2 * segment - 1 + is_second, position - is_second * first_part

        def tokens(values, empty=0):
            array = np.full(shape, empty, np.int32)
            array.reshape(-1)[target] = values
            return array

        def per_example(values, dtype, empty=0):
            array = np.full(slots, empty, dtype)
            array[row, slot] = values
            return array

        arrays = {
            "input_ids": tokens(self._encoded.tokens[source]),
            "segments": tokens(segment),
            "positions": tokens(position),
            "token_types": tokens(self._encoded.types[source]),
            "first": per_example(column, np.int32),
            "labels": per_example(self._labels[examples], self._labels.dtype),
            "weights": per_example(1.0, np.float32),
            "index": per_example(examples, np.int32, -1),
        }
        if self._encoded.learned is not None:
            arrays["targets"] = tokens(self._next(source, position), empty=-1)
        return arrays

    def _next(self, source, position):
        """int32: the token after each of those at `source`, -1 where it is not to be learned.

        position: of each in its sequence; whatever is followed by a first one is a last.
        """
        follows = np.append(position[1:], 0) > 0
        after = np.minimum(source + 1, len(self._encoded.tokens) - 1)
        return np.where(follows & self._encoded.learned[after], self._encoded.tokens[after], -1)
