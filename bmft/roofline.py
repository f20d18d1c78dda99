"""How long a step may take, from what it computes and moves and what its chip can do.

An estimate: nothing is measured. `best` takes computing, memory and links to go on at once, each as
fast as the chip's maker says it can; `worst` one after the other. What else costs time (waiting for
data, small products, dispatch) is in neither, so a step may well take longer.
"""

from typing import NamedTuple

ASSUMPTIONS = (
    "products run at the peak of bfloat16, memory and links at their full bandwidth (makers' data)",
    "best: computing, memory and links go on at once; worst: one after the other",
    "a chip sends by half of its links' bandwidth, around rings that all links share",
    "the work is spread evenly over the chips; data are never waited for, nothing is evaluated",
)


class Work(NamedTuple):
    """What one step asks of one chip."""

    products: float  # operations
    needed: float  # of them those that are no second computation of the same (remat)
    moved: float  # bytes from and to memory
    sent: float  # bytes to other chips


def estimate(work, chip, chips, *, examples, tokens=None, steps=None, epoch_steps=None, price=None):
    """{name: number}, with `best` and `worst` where it hangs on the time of a step.

    examples, tokens: of a step. steps: of the run. epoch_steps: of an epoch, if known. price: of a
    chip for an hour.
    """
    parts = {
        "computing": work.products / chip.peak,
        "memory": work.moved / chip.bandwidth,
        "links": work.sent / (chip.links / 2),
    }
    found = {"seconds": parts, "bound_by": max(parts, key=parts.get)}
    for name, seconds in (("best", max(parts.values())), ("worst", sum(parts.values()))):
        one = {"step_seconds": seconds, "mfu": work.needed / (seconds * chip.peak)}
        one["examples_per_second"] = examples / seconds
        if tokens:
            one["tokens_per_second"] = tokens / seconds
        for what, count in (("run", steps), ("epoch", epoch_steps)):
            if count:
                hours = seconds * count / 3600
                one[f"{what}_hours"] = hours
                if price is not None:
                    one[f"{what}_cost"] = hours * chips * price
        found[name] = one
    return found
