"""The task: what the network sees, mixed targets, sums of parts, metrics, what a run leaves."""

import csv
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import sklearn.metrics
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from bmft import train
from bmft.config import signature
from bmft.data.image_table import ImageTable
from bmft.errors import Mistake
from bmft.tasks import image_classification
from bmft.tasks.image_classification import Augmentation, make

CLASSES = tuple("abcdefg")
WEIGHTS = (0.5, 2.0, 1.25, 3.0, 1.0, 0.75, 1.5)
SIZE = 8
EVERYTHING = {
    "crop": "pad",
    "crop_padding": 2,
    "flip": True,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "randaugment": (2, 9),
    "mixup": 0.4,
    "cutmix": 1.0,
    "erasing": 0.25,
}


def images_of(count, size=(SIZE + 3, SIZE + 2), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


def batch_of(count=16, padding=3, seed=0):
    rng = np.random.default_rng(seed)
    real = np.arange(count) < count - padding
    return {
        "images": jnp.asarray(images_of(count, seed=seed)),
        "labels": jnp.asarray(rng.integers(0, len(CLASSES), count), jnp.int32),
        "weights": jnp.asarray(real, jnp.float32),
        "index": jnp.asarray(np.where(real, np.arange(count), -1), jnp.int32),
    }


def task_of(**settings):
    return make({}, SIZE, labels=CLASSES, **settings)


def middle(images):
    """Of pictures of SIZE + 3 by SIZE + 2."""
    return np.asarray(images, np.float32)[:, 1 : 1 + SIZE, 1 : 1 + SIZE] / 255


def means(batch, *, train):
    """A forward that needs each picture: its mean colours, stretched to the classes."""
    spread = jnp.linspace(-3, 3, 3 * len(CLASSES)).reshape(3, -1)
    return jnp.sin(7 * batch["images"].mean((1, 2)) @ spread)


# What the network sees


def test_view_is_the_middle():
    batch = batch_of()
    seen = task_of().view(batch)
    assert seen["images"].dtype == jnp.float32
    np.testing.assert_allclose(seen["images"], middle(batch["images"]), atol=1e-6)
    assert {name: seen[name] is batch[name] for name in seen} == {
        "images": False,
        "labels": True,
        "weights": True,
        "index": True,
    }


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_outputs_are_of_the_view_without_dropout(settings):
    batch, seen = batch_of(), []

    def forward(batch, *, train):
        seen.append((train, batch["images"]))
        return "logits"

    assert task_of(**settings).outputs(forward, batch) == {"logits": "logits"}
    ((in_training, images),) = seen
    assert not in_training
    np.testing.assert_allclose(images, middle(batch["images"]), atol=1e-6)


def trained_on(task, batch, key):
    """What the loss lets the network see."""
    seen = []

    def forward(batch, *, train):
        assert train
        seen.append(batch)
        return jnp.zeros((len(batch["labels"]), len(CLASSES)))

    task.loss(forward, batch, key)
    return seen[0]


RANDOM = {name: {name: value} for name, value in EVERYTHING.items() if name != "crop_padding"}
RANDOM["resized"] = {"crop": "resized"}
QUIET = {
    "nothing": {},
    "no jitter": {"jitter": (0.0, 0.0, 0.0, 0.0)},
    "of the loss": {"label_smoothing": 0.1, "class_weights": WEIGHTS},
    "of the host": {"margin": 1.2, "squash": True, "image_size": 8, "standardize": "image"},
    "unused": {"crop_padding": 7},
}


@pytest.mark.parametrize("name", QUIET)
def test_deterministic_training_sees_what_evaluation_sees(name):
    task, batch = task_of(**QUIET[name]), batch_of()
    assert task.deterministic
    seen = trained_on(task, batch, jax.random.key(0))
    np.testing.assert_array_equal(seen["images"], task.view(batch)["images"])


@pytest.mark.parametrize("name", RANDOM)
def test_training_differs_from_step_to_step_where_anything_is_random(name):
    task, batch = task_of(**RANDOM[name]), batch_of()
    assert not task.deterministic
    first, second, again = (
        trained_on(task, batch, jax.random.key(seed))["images"] for seed in (0, 1, 0)
    )
    assert first.shape == (16, SIZE, SIZE, 3)
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - second).max((1, 2, 3)) > 0).mean() > 0.2


def test_every_key_of_an_augmentation_is_one_of_the_task():
    defaults = {name: default for name, (_, default) in signature(make).items()}
    assert Augmentation(**{name: defaults[name] for name in Augmentation._fields}).nothing
    assert Augmentation() == Augmentation(**{name: defaults[name] for name in Augmentation._fields})


def test_crops_and_flips_of_the_task():
    batch = batch_of(64, 0)
    whole = np.pad(np.asarray(batch["images"]), ((0, 0), (2, 2), (2, 2), (0, 0))) / np.float32(255)
    task = task_of(crop="pad", crop_padding=2, flip=True)
    for row, image in enumerate(np.asarray(trained_on(task, batch, jax.random.key(0))["images"])):
        pieces = np.lib.stride_tricks.sliding_window_view(whole[row], (SIZE, SIZE, 3))
        pieces = pieces.reshape(-1, SIZE, SIZE, 3)
        both = np.concatenate([pieces, pieces[:, :, ::-1]])
        assert (np.abs(both - image).max((1, 2, 3)) < 1e-6).any()


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_kept_features_go_to_the_model_as_they_are(settings):
    task, batch = task_of(**settings), batch_of()
    del batch["images"]
    batch["features"] = jnp.arange(16.0 * 5).reshape(16, 5)
    assert trained_on(task, batch, jax.random.key(0)) is batch
    assert task.view(batch) is batch


# Loss


def reference(logits, labels, smoothing, weights):
    """(each, weight of each) in float64: torch's F.cross_entropy before it is reduced."""
    costs = -scipy.special.log_softmax(np.asarray(logits, np.float64), -1) * weights
    own = costs[np.arange(len(labels)), labels]
    return (1 - smoothing) * own + smoothing * costs.mean(-1), weights[labels]


@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, None), (0.1, None), (0.2, WEIGHTS)])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8}, {"cutmix": 1.0}])
def test_loss_is_that_of_both_labels_by_their_share(smoothing, weights, mixing):
    batch, key = batch_of(), jax.random.key(2)
    task = task_of(label_smoothing=smoothing, class_weights=weights, **mixing)
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (16, 7)))
    (total, weight), aux = task.loss(lambda batch, train: logits, batch, key)

    _, (own, other, share) = image_classification.training_view(
        batch, key, SIZE, Augmentation(**mixing)
    )
    of_class = np.ones(7) if weights is None else np.array(weights)
    share, real = np.asarray(share, np.float64), np.asarray(batch["weights"])
    np.testing.assert_array_equal(own, batch["labels"])
    if mixing:
        np.testing.assert_array_equal(other, np.roll(batch["labels"], -1))
        assert (share[:12] < 1).mean() > 0.7
    assert (share[12:15] == 1).all()  # the next is padding
    a, weight_a = reference(logits, np.asarray(own), smoothing, of_class)
    b, weight_b = reference(logits, np.asarray(other), smoothing, of_class)
    expected = real * (share * a + (1 - share) * b)
    assert float(total) == pytest.approx(expected.sum(), rel=1e-5)
    expected = real * (share * weight_a + (1 - share) * weight_b)
    assert float(weight) == pytest.approx(expected.sum(), rel=1e-5)
    assert float(aux["examples"]) == 13


@pytest.mark.parametrize("settings", [{}, {"mixup": 1.0}, {"cutmix": 1.0}])
def test_padding_counts_for_nothing(settings):
    task, batch, key = task_of(**settings), batch_of(), jax.random.key(0)
    clean = task.loss(means, batch, key)
    other = dict(batch)
    other["images"] = batch["images"].at[13:].set(jnp.asarray(images_of(3, seed=9)))
    other["labels"] = batch["labels"].at[13:].add(1) % 7
    assert jax.tree.map(float, task.loss(means, other, key)) == jax.tree.map(float, clean)

    def broken(batch, *, train):
        return means(batch, train=train).at[13:].set(jnp.nan)

    assert jax.tree.map(float, task.loss(broken, batch, key)) == jax.tree.map(float, clean)


def test_half_precision_logits():
    batch = batch_of()
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (16, 7)), jnp.bfloat16)
    low = task_of().loss(lambda batch, train: logits, batch, jax.random.key(0))
    exact = task_of().loss(
        lambda batch, train: logits.astype(jnp.float32), batch, jax.random.key(0)
    )
    assert jax.tree.map(float, low) == jax.tree.map(float, exact)


def linear(variables, batch, *, train, key=None, seen=None):
    """An `apply` of train.make_step: a linear model of the pixels."""
    flat = batch["images"].reshape(len(batch["images"]), -1)
    return flat @ variables["params"]["kernel"] + variables["params"]["bias"]


def stepped(task, batch, accumulate):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(0, 0.1, (SIZE * SIZE * 3, 7)), jnp.float32)
    tx = optax.sgd(0.1)
    state = train.init_state(
        {"params": {"kernel": kernel, "bias": jnp.zeros(7)}}, tx, jax.random.key(0)
    )
    return train.make_step(linear, task.loss, tx, accumulate=accumulate)(state, {}, batch)


def test_parts_add_up_to_the_batch():
    task = task_of(label_smoothing=0.1, class_weights=WEIGHTS, margin=1.3)
    (whole, seen), (parts, seen_in_parts) = (stepped(task, batch_of(), n) for n in (1, 2))
    for a, b in zip(jax.tree.leaves(whole.moving), jax.tree.leaves(parts.moving), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert float(seen["loss"]) == pytest.approx(float(seen_in_parts["loss"]), rel=1e-6)
    assert seen["examples"] == seen_in_parts["examples"] == 13
    assert float(seen["weight"]) == pytest.approx(float(seen_in_parts["weight"]), rel=1e-6)


def test_everything_at_once_is_the_same_on_eight_devices():
    task, batch = task_of(label_smoothing=0.1, **EVERYTHING), batch_of()
    alone, _ = stepped(task, batch, 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, metrics = stepped(task, jax.device_put(batch, NamedSharding(mesh, P("data"))), 1)
    for a, b in zip(jax.tree.leaves(alone.moving), jax.tree.leaves(spread.moving), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert metrics["examples"] == 13


# Labels and keys


def table_of(labels, names, **changes):
    return ImageTable(list(range(len(labels))), np.array(labels), names, **changes)


def test_labels_are_the_names_of_the_training_split():
    data = {"train": table_of([2, 0, 1], ("cat", "dog", "eel"))}
    task = make(data, SIZE)
    assert (task.labels, task.num_outputs) == (("cat", "dog", "eel"), 3)
    found = task.targets(data["train"])
    assert found.dtype == np.int32
    assert found.tolist() == [2, 0, 1]
    named = make(data, SIZE, labels=("eel", "dog", "cat"))
    assert named.targets(data["train"]).tolist() == [0, 2, 1]
    assert task.targets(ImageTable([1, 2])) is None
    with pytest.raises(Mistake, match="test.npz row 1: unknown label 'cow'; did you mean 'cat'|k"):
        task.targets(table_of([0, 1], ("cat", "cow"), source="test.npz"))


def test_every_argument_but_the_tables_and_the_size_is_a_key():
    parameters = inspect.signature(make).parameters.values()
    given = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert given == ["tables", "size"]
    assert list(signature(make)) == [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


WRONG = {
    "one class": ({"labels": ("a",)}, "all labels are 'a'"),
    "twice": ({"labels": ("a", "b", "a")}, "task.labels: 'a' comes twice"),
    "smoothing": ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is not in \[0, 1\)"),
    "weights": ({"class_weights": (1.0,)}, "has 1 numbers for 7 classes"),
    "image_size": ({"image_size": 0}, "task.image_size=0"),
    "margin": ({"margin": 0.9}, "task.margin=0.9: needs at least 1"),
    "infinite margin": ({"margin": np.inf}, "task.margin=inf"),
    "standardize": ({"standardize": "imag"}, "'imag'; did you mean 'image'"),
    "crop": ({"crop": "resize"}, "task.crop='resize'; did you mean 'resized'"),
    "padding": ({"crop": "pad", "crop_padding": -1}, "task.crop_padding=-1"),
    "no padding": ({"crop": "pad", "crop_padding": 0}, "needs task.margin above 1"),
    "jitter": ({"jitter": (0.4, 0.4)}, r"task.jitter=\(0.4, 0.4\): needs brightness, contrast"),
    "negative jitter": ({"jitter": (0.4, -0.4, 0.0, 0.0)}, "needs brightness, contrast"),
    "hue": ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue is at most 0.5"),
    "randaugment": ({"randaugment": (2,)}, r"task.randaugment=\(2,\): needs n, m"),
    "no operations": ({"randaugment": (0, 9)}, "at least 1 operation"),
    "magnitude": ({"randaugment": (2, 31)}, "magnitude 0 to 30"),
    "mixup": ({"mixup": -0.1}, "task.mixup=-0.1: needs an alpha of at least 0"),
    "cutmix": ({"cutmix": np.nan}, "task.cutmix=nan"),
    "erasing": ({"erasing": 1.1}, "task.erasing=1.1: needs a share from 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit(settings, message):
    with pytest.raises(Mistake, match=message) as caught:
        make({}, SIZE, **{"labels": CLASSES} | settings)
    assert "\n" not in str(caught.value)


def test_no_classes():
    for tables in ({}, {"train": ImageTable([1, 2])}, {"test": table_of([0, 1], ("a", "b"))}):
        with pytest.raises(Mistake, match="no labelled training split.*task.labels"):
            make(tables, SIZE)


def test_a_crop_of_a_larger_image_needs_no_padding():
    task = task_of(crop="pad", crop_padding=0, margin=1.25)
    batch = batch_of()
    seen = trained_on(task, batch, jax.random.key(0))["images"]
    assert not (np.asarray(seen) == 0).all(-1).any()  # no black pixels around
    assert np.abs(seen - middle(batch["images"])).max() > 0


# Metrics


def logits_of(count, classes=7):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, count)
    logits = rng.normal(0, 2, (count, classes)).astype(np.float32)
    logits[np.arange(count), targets] += 2
    return logits, targets


def guo(logits, targets, bins=15):
    """Expected calibration error, bin by bin."""
    p = scipy.special.softmax(np.asarray(logits, np.float64), -1)
    confidence, right = p.max(-1), p.argmax(-1) == targets
    error = 0.0
    for low in np.arange(bins) / bins:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_metrics():
    task = task_of()
    logits, targets = logits_of(400)
    found = task.metrics({"logits": logits}, targets)
    assert set(found) == set(task.directions)
    assert all(type(value) is float for value in found.values())
    assert task.metric == ("accuracy", "max")
    least = {name for name, kind in task.directions.items() if kind == "min"}
    assert least == {"loss", "calibration_error"}
    predicted = logits.argmax(-1)
    assert found["accuracy"] == (predicted == targets).mean()
    ranks = (logits > logits[np.arange(400), targets][:, None]).sum(-1)
    assert found["top5"] == (ranks < 5).mean()
    assert found["accuracy"] < found["top5"] < 1
    assert found["loss"] == pytest.approx(sklearn.metrics.log_loss(
        targets, scipy.special.softmax(logits.astype(np.float64), -1), labels=np.arange(7)
    ))  # fmt: skip
    for name in ("precision", "recall", "f1"):
        scorer = getattr(sklearn.metrics, f"{name}_score")
        assert found[f"macro_{name}"] == pytest.approx(scorer(targets, predicted, average="macro"))
    assert found["calibration_error"] == pytest.approx(guo(logits, targets), abs=1e-9)


def test_top5_is_of_more_than_five_classes():
    for count in (2, 5, 6):
        task = make({}, SIZE, labels=CLASSES[:count])
        logits, targets = logits_of(40, classes=count)
        found = task.metrics({"logits": logits}, targets)
        assert ("top5" in found) == ("top5" in task.directions) == (count > 5)


def test_calibration_error_of_a_model_that_is_too_sure():
    logits = np.array([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    task = make({}, SIZE, labels=("a", "b"))
    sure = 1 / (1 + np.exp(-9.0))
    right = task.metrics({"logits": logits}, np.array([0, 0, 1, 1]))
    assert right["calibration_error"] == pytest.approx(1 - sure)
    half = task.metrics({"logits": logits}, np.array([0, 1, 1, 0]))
    assert half["calibration_error"] == pytest.approx(sure - 0.5)
    even = task.metrics({"logits": np.zeros((4, 2))}, np.array([0, 1, 0, 1]))
    assert even["calibration_error"] == 0


def test_a_class_that_never_occurs_counts_as_zero():
    found = task_of().metrics({"logits": np.eye(7)[[0, 1, 1]] * 9}, np.array([0, 1, 1]))
    assert found["macro_recall"] == pytest.approx(2 / 7)


def test_an_unlabelled_split_is_not_measured():
    assert task_of().metrics({"logits": np.zeros((3, 7))}, None) == {}


def test_decode():
    first, second = make({}, SIZE, labels=("no", "yes")).decode(
        {"logits": np.array([[0.0, 0.0], [1.0, 3.0]], np.float32)}
    )
    assert first == {"label": "no", "scores": {"no": 0.5, "yes": 0.5}, "logits": [0.0, 0.0]}
    assert second["label"] == "yes"
    assert second["scores"]["yes"] == pytest.approx(1 / (1 + np.exp(-2)))


# What a run leaves of its classes


def test_per_class(tmp_path):
    outputs = {"logits": np.eye(3)[[0, 0, 1, 2, 2, 2]]}
    rows = image_classification.per_class(
        outputs, np.array([0, 1, 1, 2, 2, 0]), ("cat", 'a "dog", or so', "eel")
    )
    assert rows[0] == {
        "label": "cat",
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "support": 2,
    }
    assert (rows[1]["precision"], rows[1]["recall"]) == (1.0, 0.5)
    assert (rows[2]["precision"], rows[2]["recall"]) == (pytest.approx(2 / 3), 1.0)
    read = list(csv.DictReader(image_classification.csv_text(rows).splitlines()))
    assert [row["label"] for row in read] == ["cat", 'a "dog", or so', "eel"]
    assert float(read[2]["f1"]) == pytest.approx(0.8)


def draw(path, classes, targets, predicted):
    """The PNG's pixels, as far as they are blue or white: the cells and the bar."""
    logits = np.zeros((len(targets), classes), np.float32)
    logits[np.arange(len(targets)), predicted] = 1
    labels = tuple(f"class {i}" for i in range(classes))
    image_classification.draw_confusion(path, {"logits": logits}, np.array(targets), labels)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_confusions_are_drawn_where_they_are(tmp_path):
    pixels = draw(tmp_path / "new" / "a.png", 2, [0] * 9 + [1] * 9, [0] * 9 + [0] * 9)
    full = np.array([8, 48, 107])  # the end of matplotlib's Blues
    dark = (np.abs(pixels - full) <= 2).all(-1)
    rows, columns = np.flatnonzero(dark.sum(1) > 60), np.flatnonzero(dark.sum(0) > 60)
    # Everything was taken for the first class: the left column is full, the right one empty.
    left = pixels[rows[0] + 5 : rows[-1] - 5, columns[0] + 5 : columns[-1] - 5]
    assert (np.abs(left - full).max(-1) < 3).mean() > 0.9
    assert rows[-1] - rows[0] > 1.8 * (columns[-1] - columns[0])


@pytest.mark.parametrize("classes", [3, 21, 1000])
def test_confusions_of_few_and_many_classes(classes, tmp_path):
    targets = np.arange(classes).repeat(2)
    predicted = targets.copy()
    clean = draw(tmp_path / "a.png", classes, targets, predicted)
    predicted[-2] = 0  # one of the last class is taken for the first
    pixels = draw(tmp_path / "b.png", classes, targets, predicted)
    assert pixels.shape == clean.shape
    assert max(pixels.shape) < 1700
    changed = np.argwhere(np.abs(pixels - clean).max(-1) > 60)
    assert len(changed)  # seen, however many there are
    below, left = changed[:, 0].max(), changed[:, 1].min()
    assert below > 0.4 * pixels.shape[0]
    assert left < 0.5 * pixels.shape[1]


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="cannot write .*confusion.png"):
        draw(tmp_path / "file" / "confusion.png", 2, [0, 1], [0, 1])
