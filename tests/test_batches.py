"""Batches: what lies where, the same on any host and after any interruption."""

import itertools

import numpy as np
import pytest

from bmft.data.batches import Batches, row_length
from bmft.data.text import Encoded
from bmft.errors import Mistake

N, T = 107, 40


def encoded(n=N, seed=0):
    """Random examples in which every token id occurs once, so that a misplaced one shows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 23, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1000, 1000 + offsets[-1], dtype=np.int32)
    return Encoded(tokens, (tokens % 2).astype(np.uint8), offsets, 0)


def labels(n=N):
    return np.random.default_rng(1).integers(0, 5, n)


def batches(**changes):
    settings = {"batch_size": 10, "row_length": T, "seed": 3, "shuffle": True} | changes
    return Batches(encoded(), labels(), **settings)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shuffle", [True, False])
def test_everything_of_an_example_lies_at_its_place(shuffle):
    examples, classes = encoded(), labels()
    found, seen = batches(shuffle=shuffle), []
    assert len(found) == 11
    for batch in found:
        covered = np.zeros_like(batch["segments"], bool)
        for row, slot in zip(*np.nonzero(batch["index"] >= 0), strict=True):
            i = batch["index"][row, slot]
            own = slice(*examples.offsets[i : i + 2])
            (columns,) = np.nonzero(batch["segments"][row] == slot + 1)
            assert columns[0] == batch["first"][row, slot]
            assert np.array_equal(columns, columns[0] + np.arange(len(columns)))
            assert np.array_equal(batch["input_ids"][row, columns], examples.tokens[own])
            assert np.array_equal(batch["token_types"][row, columns], examples.types[own])
            assert np.array_equal(batch["positions"][row, columns], np.arange(len(columns)))
            assert batch["labels"][row, slot] == classes[i]
            assert batch["weights"][row, slot] == 1
            covered[row, columns] = True
            seen.append(i)
        empty = batch["index"] < 0
        for name in ("first", "labels", "weights"):
            assert not batch[name][empty].any()
        for name in ("input_ids", "segments", "positions", "token_types"):
            assert not batch[name][~covered].any()
    assert sorted(seen) == list(range(N))


def test_shapes_and_types():
    batch = batches(rows_multiple=4).at(0)
    rows, slots = batch["index"].shape
    assert rows % 4 == 0
    for name in ("input_ids", "segments", "positions", "token_types"):
        assert (batch[name].shape, batch[name].dtype) == ((rows, T), np.int32)
    for name in ("first", "labels", "index"):
        assert (batch[name].shape, batch[name].dtype) == ((rows, slots), np.int32)
    assert (batch["weights"].shape, batch["weights"].dtype) == ((rows, slots), np.float32)


def test_labels_may_be_numbers_or_absent():
    scores = np.linspace(0, 5, N)
    batch = Batches(encoded(), scores, batch_size=10, row_length=T).at(2)
    real = batch["index"] >= 0
    assert batch["labels"].dtype == np.float32
    assert np.array_equal(batch["labels"][real], scores[batch["index"][real]].astype(np.float32))
    batch = Batches(encoded(), batch_size=10, row_length=T).at(2)
    assert batch["labels"].dtype == np.int32
    assert not batch["labels"].any()
    assert np.array_equal(batch["weights"], (batch["index"] >= 0).astype(np.float32))


def test_a_batch_depends_on_the_step_alone():
    in_order, jumping = batches(), batches()
    expected = [in_order.at(step) for step in range(40)]
    for step in (39, 3, 12, 11, 38, 0, 25):
        assert equal(jumping.at(step), expected[step])
        assert equal(batches().at(step), expected[step])  # nothing asked of it before
    assert not equal(batches(seed=4).at(0), expected[0])


def test_every_epoch_holds_every_example_once_in_another_order():
    found = batches()
    epochs = []
    for epoch in range(3):
        index = [found.at(epoch * 11 + step)["index"] for step in range(11)]
        epochs.append(np.concatenate([i[i >= 0] for i in index]))
        assert sorted(epochs[-1]) == list(range(N))
        assert sum((index[-1] >= 0).ravel()) == 7  # the last, partial one
    assert not np.array_equal(epochs[0], epochs[1])


def test_shapes_stay_over_the_epochs():
    found = batches()
    shapes = {found.at(step)["index"].shape for step in range(0, 11 * 30, 7)}
    assert len({slots for _, slots in shapes}) == 1
    assert len(shapes) <= 2  # a later epoch may need one row more


def test_without_shuffling_every_epoch_is_the_same():
    found = batches(shuffle=False)
    assert equal(found.at(2), found.at(2 + len(found)))


# Which parts of the rows each host has; they need not be neighbours.
SHARES = [((0,), (1,)), ((0,), (1,), (2,)), ((0, 1), (2, 3), (4, 5)), ((0, 2), (1,), (0, 2))]


def together(shares, found):
    """The parts that hosts with these shares have, in order: what all have of one batch."""
    parts = {}
    for numbers, batch in zip(shares, found, strict=True):
        pieces = {name: np.split(array, len(numbers)) for name, array in batch.items()}
        for place, number in enumerate(numbers):
            parts[number] = {name: arrays[place] for name, arrays in pieces.items()}
    ordered = [parts[number] for number in range(len(parts))]
    return {name: np.concatenate([part[name] for part in ordered]) for name in ordered[0]}


@pytest.mark.parametrize("shares", SHARES)
def test_hosts_hold_their_shares_of_one_batch(shares):
    whole, count = batches(rows_multiple=6), 1 + max(map(max, shares))
    hosts = [batches(rows_multiple=6, share=(numbers, count)) for numbers in shares]
    for step in (0, 10, 17):  # the last of an epoch, whose last rows are empty, among them
        assert equal(together(shares, [host.at(step) for host in hosts]), whole.at(step))


def test_the_number_of_devices_adds_empty_rows_and_nothing_else():
    few, many = batches(rows_multiple=1).at(5), batches(rows_multiple=8).at(5)
    rows = len(few["index"])
    assert len(many["index"]) % 8 == 0
    assert equal(few, {name: array[:rows] for name, array in many.items()})
    assert not many["weights"][rows:].any()
    assert (many["index"][rows:] == -1).all()


def learned(second=False, seed=5):
    """Examples of which some tokens are learned; with `second`, each is two sequences."""
    plain, rng = encoded(), np.random.default_rng(seed)
    mask = rng.random(plain.offsets[-1]) < 0.6
    parts = rng.integers(1, plain.lengths) if second else None
    return plain._replace(learned=mask, second=parts)


@pytest.mark.parametrize("second", [False, True], ids=["one sequence", "two sequences"])
def test_targets_are_the_next_tokens_that_are_learned(second):
    examples = learned(second)
    for batch in Batches(examples, batch_size=10, row_length=T, seed=3, shuffle=True):
        expected = np.full_like(batch["input_ids"], -1)
        for row, slot in zip(*np.nonzero(batch["index"] >= 0), strict=True):
            i, column = batch["index"][row, slot], batch["first"][row, slot]
            start, end = examples.offsets[i : i + 2]
            cuts = [start, start + examples.second[i], end] if second else [start, end]
            for part, (a, b) in enumerate(itertools.pairwise(cuts)):
                segment = 2 * slot + part + 1 if second else slot + 1
                columns = np.arange(column + a - start, column + b - start)
                assert (batch["segments"][row, columns] == segment).all()
                assert np.array_equal(batch["positions"][row, columns], np.arange(b - a))
                for c, token in zip(columns[:-1], range(a + 1, b), strict=True):
                    if examples.learned[token]:
                        expected[row, c] = examples.tokens[token]
        assert np.array_equal(batch["targets"], expected)
        assert batch["targets"].dtype == np.int32


def test_virtual_tokens_are_not_learned():
    examples = learned(second=True)
    before, after = set(), set()
    for batch in Batches(examples, batch_size=10, row_length=T):
        before |= {*batch["targets"].ravel()}
    for batch in Batches(examples.behind(range(7, 9)), batch_size=10, row_length=T):
        after |= {*batch["targets"].ravel()}
        virtual = np.isin(batch["input_ids"], [7, 8])
        assert np.array_equal(virtual, (batch["segments"] > 0) & (batch["positions"] < 2))
    # A first token now has some before it, from which it can be predicted.
    firsts = np.concatenate([examples.offsets[:-1], examples.offsets[:-1] + examples.second])
    assert after - before == {*examples.tokens[firsts[examples.learned[firsts]]]}
    assert before <= after


def test_figures_for_the_report():
    found = batches(rows_multiple=4)
    real = [(batch["segments"] > 0).sum() for batch in found]
    places = [batch["segments"].size for batch in found]
    assert found.examples == N
    assert found.steps_per_epoch == len(found) == 11
    assert found.tokens_per_step == pytest.approx(np.mean(real))
    assert found.padding_share == pytest.approx(1 - sum(real) / sum(places))


def test_put_is_applied():
    found = batches(put=lambda arrays: sorted(arrays))
    assert found.at(0) == sorted(batches().at(0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="labels"):
        Batches(encoded(), labels(N - 1), batch_size=10, row_length=T)
    with pytest.raises(ValueError, match="2 equal parts"):
        batches(rows_multiple=3, share=((0,), 2))


@pytest.mark.parametrize(
    ("value", "longest", "platform", "expected"),
    [
        (None, 5, "cpu", 64),
        (None, 64, "cpu", 64),
        (None, 65, "cpu", 96),
        (None, 97, "cpu", 128),
        (None, 5, "tpu", 128),
        (None, 129, "gpu", 256),
        (70, 70, "cpu", 70),
    ],
)
def test_row_length(value, longest, platform, expected):
    assert row_length(value, longest, platform) == expected


def test_row_length_by_the_data():
    """Rows are rounded up to the devices: some lengths waste a row of few, others do not."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(1.5, 6.9, 8000) + 3, 3, 64).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.ones(offsets[-1], np.int32)
    examples = Encoded(tokens, tokens.astype(np.uint8), offsets, 0)

    def padding(tokens):
        settings = {"batch_size": 32, "shuffle": True, "rows_multiple": 2}
        return Batches(examples, row_length=tokens, **settings).padding_share

    settings = {"lengths": lengths, "batch_size": 32, "rows_multiple": 2}
    chosen = row_length(None, 64, "cpu", **settings)
    assert chosen % 16 == 0
    assert padding(chosen) < 0.10 < padding(64)
    assert row_length(80, 64, "cpu", **settings) == 80
    assert row_length(None, 64, "tpu", **settings) == 128
    assert row_length(None, 300, "cpu") == 320
    # Of long examples, too: rows of the longest may hold one and a half.
    long = {"lengths": np.linspace(60, 310, 800), "batch_size": 16, "rows_multiple": 2}
    chosen = row_length(None, 310, "cpu", **long)
    assert chosen % 32 == 0 and 320 < chosen <= 640


def test_a_row_shorter_than_an_example_is_the_users_mistake():
    with pytest.raises(Mistake, match=r"data\.row_length=64 .* 71 tokens"):
        row_length(64, 71, "cpu")
