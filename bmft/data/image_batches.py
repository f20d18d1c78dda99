"""Batches of images, fixed in shape, each a function of (seed, step) alone.

    batches = ImageBatches(table, labels, batch_size=32, resize=Resize(256), shuffle=True)
    batches.at(1234)        # whatever was asked before: resuming needs nothing but the step

b rows, of H = resize.host pixels in height and width:

    images   uint8 [b, H, H, 3]
    labels   int32 [b]
    weights  float32 [b]     1 for an image, 0 for padding
    index    int32 [b]       the image's number in the split; -1 for padding

Padding repeats images of the batch, so that statistics over it are of images.
"""

import functools
import os

import numpy as np

from bmft.data import images

# One to a core, as Pillow lets go of Python's lock; on two cores four were no faster than two.
THREADS = min(16, os.cpu_count() or 1)
AHEAD = THREADS + 2  # batches


class ImageBatches:
    """The batches of one split, for training (shuffle=True) or one pass over it in order.

    table: `ImageTable`. targets: int [n], None where there are none to learn from. batch_size:
    images a step; a last step may hold fewer. resize: `images.Resize`; None where the table's
    images are an array [n, ...] to take as it is, of features for instance. rows_multiple: the
    number of rows is a multiple of this (devices x parts of a batch). put: what `at` returns is
    put(arrays). share: (numbers, count); the arrays hold these of `count` equal parts of the rows,
    those of this host, and no other image is read. Which image lies where depends on neither
    rows_multiple nor share.

    Images that have to be decoded or resized are prepared ahead, by threads, as soon as two steps
    were asked for in turn: a JPEG of 500 x 375 pixels takes a core 4 ms (1.5 to decode, 2.3 to
    resize to 256, bicubic). Arrays of the right size are only copied.

    examples, steps_per_epoch, padding_share (of the rows) and tokens_per_step (None: there are
    none) are what logs and reports need.
    """

    tokens_per_step = None

    def __init__(
        self,
        table,
        targets=None,
        *,
        batch_size,
        resize,
        seed=0,
        shuffle=False,
        rows_multiple=1,
        put=lambda arrays: arrays,
        share=((0,), 1),
    ):
        self.examples = table.size
        if rows_multiple % share[1]:
            raise ValueError(f"{rows_multiple} rows at a time are not {share[1]} equal parts")
        targets = np.zeros(self.examples, np.int32) if targets is None else np.asarray(targets)
        if targets.shape != (self.examples,):
            raise ValueError(f"labels {targets.shape} of {self.examples} examples")
        self.steps_per_epoch = -(-self.examples // batch_size)
        rows = -(-min(batch_size, self.examples) // rows_multiple) * rows_multiple
        self.padding_share = 1 - self.examples / (self.steps_per_epoch * rows)
        order = _order(self.examples, seed) if shuffle else None
        self._steps = _Steps(table, targets, batch_size, rows, resize, order, share)
        self._shuffle, self._put = shuffle, put
        self._last, self._ahead = None, None  # the step before; what Grain prepares, if anything

    def __len__(self):
        """Steps of one pass."""
        return self.steps_per_epoch

    def __iter__(self):
        """One pass."""
        return map(self.at, range(self.steps_per_epoch))

    def at(self, step):
        """put(the arrays) of `step`, counted from 0 over all epochs.

        Raises Mistake, naming the file or row, for an image that can no longer be read.
        """
        return self._put(self._steps[step] if self._steps.ready else self._prepared(step))

    def _prepared(self, step):
        step = step if self._shuffle else step % self.steps_per_epoch
        following = None if self._last is None else self._last + 1
        if not self._shuffle and following == self.steps_per_epoch:
            following = 0  # evaluations begin where the last one ended
        self._last = step
        if step != following:
            self._stop()
            return self._steps[step]
        try:
            if self._ahead is None:
                self._ahead = self._start(step)
            return next(self._ahead)
        except BaseException:  # whatever it was, the next step has to begin anew
            self._stop()
            raise

    def _start(self, step):
        import grain  # imports Orbax: a second

        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        steps = grain.MapDataset.source(self._steps).slice(slice(step, None))
        return iter(steps.to_iter_dataset(options))

    def _stop(self):
        """Closed, Grain's iterator ends its threads; dropped with this object, it closes itself."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _order(examples, seed):
    """epoch -> int64 [examples], the order of that epoch."""

    @functools.lru_cache(2)  # batches ahead may be of the next epoch
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(examples)

    return order


class _Steps:
    """`steps[i]` makes batch i: what Grain calls a random access source. It refers to no
    `ImageBatches`, which therefore goes when its last user does."""

    def __init__(self, table, targets, batch_size, rows, resize, order, share):
        self._table, self._targets = table, targets.astype(np.int32)
        self._batch_size, self._rows, self._resize = batch_size, rows, resize
        self._order, self._epoch_steps = order, -(-table.size // batch_size)
        numbers, count = share
        self._mine = np.arange(rows).reshape(count, -1)[list(numbers)].ravel()
        self.ready = resize is None
        if resize is not None:
            _ = resize.filter  # an unknown name is found here, not by a thread
            size = (resize.host, resize.host, 3)
            self.ready = isinstance(table.images, np.ndarray) and table.images.shape[1:] == size

    def __len__(self):
        return 2**62  # there is no last epoch

    def __getitem__(self, step):
        epoch, step = divmod(step, self._epoch_steps)
        here = slice(step * self._batch_size, (step + 1) * self._batch_size)
        if self._order is None:
            examples = np.arange(self._table.size)[here]
        else:
            examples = self._order(epoch)[here]
        real = np.arange(self._rows) < len(examples)
        examples = np.resize(examples, self._rows)  # repeats them
        mine, real = examples[self._mine], real[self._mine]
        return {
            "images": self._images(mine),
            "labels": self._targets[mine],
            "weights": real.astype(np.float32),
            "index": np.where(real, mine, -1).astype(np.int32),
        }

    def _images(self, rows):
        table = self._table
        if self.ready:
            return np.asarray(table.images[rows])  # they may lie in a file
        pixels = np.empty((len(rows), self._resize.host, self._resize.host, 3), np.uint8)
        first = {}
        for place, row in enumerate(rows.tolist()):
            if row in first:
                pixels[place] = pixels[first[row]]
                continue
            first[row] = place
            pixels[place] = images.decode(
                table.images[row], self._resize, table.to_rgb, table.where(row)
            )
        return pixels
