"""The plan of an epoch: every example once, no two in one place, honest and balanced."""

import numpy as np
import pytest

from bmft.data.packing import plan


def tweet_like(n, seed=0):
    """Lengths distributed like those of `tweets`."""
    return np.clip(np.random.default_rng(seed).normal(32.6, 12, n), 5, 64).astype(np.int64)


def phrase_like(n, seed=0):
    """Lengths distributed like those of SST-2: many short phrases, a long tail."""
    return np.clip(np.random.default_rng(seed).gamma(1.7, 7, n) + 3, 3, 66).astype(np.int64)


def steps_of(found):
    return [found.order[a:b] for a, b in zip(found.starts, found.starts[1:], strict=False)]


CASES = [
    (tweet_like(1003), 32, 64, True, None),
    (tweet_like(1003), 32, 64, False, None),
    (phrase_like(997), 16, 66, True, None),
    (phrase_like(640), 64, 128, True, 5),
    (phrase_like(640), 64, 128, False, 3),
    (tweet_like(7), 32, 64, True, None),
    (tweet_like(31), 1, 64, True, None),
    (np.array([64]), 4, 64, False, None),
]


@pytest.mark.parametrize(("lengths", "batch_size", "row_length", "shuffle", "slots"), CASES)
def test_everything_lies_somewhere_once_and_nothing_overlaps(
    lengths, batch_size, row_length, shuffle, slots
):
    found = plan(lengths, batch_size, row_length, 3, 1, shuffle, slots)
    assert sorted(found.order) == list(range(len(lengths)))
    assert found.steps == -(-len(lengths) // batch_size)
    for s, (a, b) in enumerate(zip(found.starts, found.starts[1:], strict=False)):
        used = np.zeros((found.rows, row_length), bool)
        places = set()
        for i in range(a, b):
            start, end = found.column[i], found.column[i] + lengths[found.order[i]]
            assert end <= row_length
            assert not used[found.row[i], start:end].any(), s
            used[found.row[i], start:end] = True
            places.add((found.row[i], found.slot[i]))
        assert len(places) == b - a
        for row in range(found.rows):  # examples of a row touch, and slots count from 0
            slots_here = sorted(slot for r, slot in places if r == row)
            assert slots_here == list(range(len(slots_here)))
            assert used[row, : used[row].sum()].all()
    assert found.slots == found.slot.max() + 1 <= (slots or row_length)


def test_shuffled_steps_are_full_but_the_last():
    sizes = list(map(len, steps_of(plan(tweet_like(1003), 32, 64))))
    assert sizes == [32] * 31 + [11]


def test_a_pass_in_order_shares_the_examples_out_evenly():
    sizes = list(map(len, steps_of(plan(tweet_like(1003), 64, 64, shuffle=False))))
    assert len(sizes) == 16
    assert set(sizes) <= {62, 63}


def test_the_plan_is_a_function_of_seed_and_epoch():
    lengths = tweet_like(500)
    first = plan(lengths, 16, 64, seed=5, epoch=2)
    again = plan(lengths, 16, 64, seed=5, epoch=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, epoch in [(5, 3), (6, 2), (2, 5)]:
        assert not np.array_equal(first.order, plan(lengths, 16, 64, seed, epoch).order)


def test_a_pass_in_order_is_always_the_same():
    lengths = tweet_like(500)
    first, again = (plan(lengths, 16, 64, *at, shuffle=False) for at in [(0, 0), (1, 7)])
    assert np.array_equal(first.order, again.order)


@pytest.mark.parametrize(("lengths", "spread"), [(tweet_like(6400), 4), (phrase_like(6400), 25)])
def test_steps_hold_nearly_the_same_number_of_tokens(lengths, spread):
    totals = [lengths[step].sum() for step in steps_of(plan(lengths, 32, 128))]
    assert max(totals) - min(totals) <= spread
    at_random = np.random.default_rng(0).permutation(lengths).reshape(-1, 32).sum(1)
    assert max(totals) - min(totals) < np.ptp(at_random) / 5


@pytest.mark.parametrize("epoch", range(3))
def test_padding_of_tweet_like_texts_is_under_a_tenth(epoch):
    lengths = tweet_like(6400)
    found = plan(lengths, 32, 64, 0, epoch)
    assert 1 - lengths.sum() / (found.steps * found.rows * 64) < 0.10


@pytest.mark.parametrize("lengths", [tweet_like(2048), np.arange(1, 2049)])
def test_an_example_meets_others_in_the_next_epoch(lengths):
    """Also where all lengths differ, so that ties leave nothing to chance."""

    def pairs(epoch):
        steps = steps_of(plan(lengths, 32, 2048, 0, epoch))
        return {(a, b) for step in steps for a in step for b in step if a < b}

    first, second = pairs(0), pairs(1)
    by_chance = len(first) * len(second) / (2048 * 2047 / 2)
    assert len(first & second) < 1.5 * by_chance


def test_every_example_is_as_likely_in_any_step():
    lengths = phrase_like(256)
    where = np.zeros((256, 8))
    for epoch in range(400):
        for step, examples in enumerate(steps_of(plan(lengths, 32, 128, 0, epoch))):
            where[examples, step] += 1
    expected = 400 / 8
    chi_squared = ((where - expected) ** 2 / expected).sum()
    assert 0.9 < chi_squared / (256 * 7) < 1.1


def test_rows_are_packed_by_first_fit_decreasing():
    lengths = phrase_like(200)
    found = plan(lengths, 20, 66)
    for s, step in enumerate(steps_of(found)):
        free = []
        for length in sorted(lengths[step], reverse=True):
            row = next((r for r, left in enumerate(free) if left >= length), len(free))
            free[row:] = [*free[row:], 66] if row == len(free) else free[row:]
            free[row] -= length
        assert found.row[found.starts[s] : found.starts[s + 1]].max() + 1 == len(free)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([], "no examples"), ([3, 0, 4], "example 1 has 0"), ([3, 65], "example 1 has 65 tokens")],
)
def test_what_cannot_be_planned_is_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        plan(lengths, 2, 64)
