"""The task: torch's losses, GLUE's metrics and files, and which labels there are."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmft import tasks
from bmft.data import glue
from bmft.data.table import Table
from bmft.errors import Mistake
from bmft.tasks.text_classification import make

# torch.nn.functional.cross_entropy of torch 2.13.0, float64, of these logits and labels:
LOGITS = [
    [0.251, -0.264, 1.281, 0.21],
    [-1.071, 0.723, 2.608, 1.894],
    [-1.407, -2.531, -1.247, 0.083],
    [-4.65, -0.438, -2.492, -1.465],
    [-1.089, -0.633, 0.823, 2.085],
    [-0.257, 2.733, -1.33, 0.703],
]
LABELS = [0, 3, 1, 1, 2, 0]
WEIGHTS = (0.5, 2.0, 1.25, 3.0)
TORCH = {  # (label_smoothing, weight): value
    (0.0, None): 1.855621813271884,
    (0.0, WEIGHTS): 1.6241469656090206,
    (0.1, None): 1.8741551466052173,
    (0.1, WEIGHTS): 1.646215872933284,
    (0.4, None): 1.9297551466052174,
    (0.4, WEIGHTS): 1.7124225949060752,
}
CLASSES = ("a", "b", "c", "d")


def slots(values, empty, dtype):
    """Six examples in [3, 3] slots, of which three are empty."""
    values = np.asarray(values)
    array = np.full((3, 3, *values.shape[1:]), empty, dtype)
    array[[0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]] = values
    return jnp.array(array)


def batch(labels, dtype=np.int32):
    return {"labels": slots(labels, 0, dtype), "weights": slots([1.0] * 6, 0, np.float32)}


def summed(task, logits, batch):
    """(sum, weight) of the task's loss."""

    def forward(batch, *, train):
        assert train
        return logits

    sums, aux = task.loss(forward, batch, jax.random.key(0))
    assert aux.get("examples", sums[1]) == (batch["weights"] > 0).sum()
    return sums


@pytest.mark.parametrize(("smoothing", "weights"), TORCH)
def test_loss_is_that_of_torch(smoothing, weights):
    task = make({}, labels=CLASSES, label_smoothing=smoothing, class_weights=weights)
    total, weight = summed(task, slots(LOGITS, 7.0, np.float32), batch(LABELS))
    assert total / weight == pytest.approx(TORCH[smoothing, weights], rel=1e-6)
    assert weight == (6 if weights is None else sum(weights[label] for label in LABELS))
    assert total.dtype == weight.dtype == jnp.float32


@pytest.mark.parametrize("settings", [{"labels": CLASSES}, {"regression": True}])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_empty_slots_count_for_nothing(settings, garbage):
    task = make({}, **settings)
    logits = np.array(LOGITS)[:, : task.num_outputs]
    clean = summed(task, slots(logits, 0.0, np.float32), batch(LABELS))
    assert summed(task, slots(logits, garbage, np.float32), batch(LABELS)) == clean

    def total(logits):
        return summed(task, logits, batch(LABELS))[0]

    gradient = jax.grad(total)(slots(logits, garbage, np.float32))
    assert np.isfinite(gradient).all()
    assert not gradient[2, 1:].any()


def test_loss_is_computed_in_float32():
    task = make({}, labels=CLASSES)
    low = slots(LOGITS, 0.0, np.float32).astype(jnp.bfloat16)
    exact = summed(task, low.astype(jnp.float32), batch(LABELS))
    assert summed(task, low, batch(LABELS)) == exact


def test_parts_add_up_to_the_batch():
    task = make({}, labels=CLASSES, class_weights=WEIGHTS, label_smoothing=0.1)
    logits, whole = slots(LOGITS, 0.0, np.float32), batch(LABELS)
    total, weight = summed(task, logits, whole)
    parts = [
        summed(task, logits[row : row + 1], {k: v[row : row + 1] for k, v in whole.items()})
        for row in range(3)
    ]
    assert float(total) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-6)
    assert weight == sum(part[1] for part in parts)


def test_regression_loss():
    task = make({}, regression=True)
    scores = [0.0, 5.0, 2.5, 1.0, 3.0, 4.0]
    predicted = np.array(scores) + [1, -1, 0.5, 0, 2, -0.5]
    logits = slots(predicted[:, None], 9, np.float32)
    total, weight = summed(task, logits, batch(scores, np.float32))
    assert (total, weight) == (1 + 1 + 0.25 + 4 + 0.25, 6)


def test_outputs_are_the_logits_without_dropout():
    def forward(batch, *, train):
        return {True: "train", False: "evaluate"}[train]

    assert make({}, labels=CLASSES).outputs(forward, {}) == {"logits": "evaluate"}


# Which labels there are


def tables(labels, **changes):
    texts = [f"text {i}" for i in range(len(labels))]
    return {"train": Table(texts, None, labels, source="train.csv", **changes)}


@pytest.mark.parametrize(
    ("labels", "names", "expected", "targets"),
    [
        (["pos", "neg", "pos"], None, ("neg", "pos"), [1, 0, 1]),
        (["10", "9", "-1", " 9 "], None, ("-1", "9", "10"), [2, 1, 0, 1]),
        ([10, 9, 10], None, ("9", "10"), [1, 0, 1]),
        ([1.0, 0.0, 1], None, ("0", "1"), [1, 0, 1]),
        ([True, False], None, ("false", "true"), [1, 0]),
        (["1", "x"], None, ("1", "x"), [0, 1]),
        ([1, 0, 1], ("unacceptable", "acceptable"), ("unacceptable", "acceptable"), [1, 0, 1]),
    ],
)
def test_labels_come_from_the_data(labels, names, expected, targets):
    data = tables(labels, names=names)
    task = make(data)
    assert (task.labels, task.num_outputs) == (expected, len(expected))
    found = task.targets(data["train"])
    assert found.dtype == np.int32
    assert found.tolist() == targets


def test_labels_in_the_order_of_the_config():
    data = tables(["pos", "neg"])
    task = make(data, labels=("pos", "neutral", "neg"))
    assert task.num_outputs == 3
    assert task.targets(data["train"]).tolist() == [0, 2]


def test_labels_of_another_split_in_another_form():
    task = make(tables([1, 0]))
    other = Table(["a"], None, ["1"])
    assert task.targets(other).tolist() == [1]
    assert task.targets(Table(["a"])) is None


def test_numbers_are_for_regression():
    data = tables([0.5, "3", 2])
    task = make(data, regression=True)
    assert (task.labels, task.num_outputs) == (None, 1)
    found = task.targets(data["train"])
    assert found.dtype == np.float32
    assert found.tolist() == [0.5, 3.0, 2.0]
    assert make(tables(["0.5", "2"]), labels=("0.5", "2")).labels == ("0.5", "2")


TOO_MANY = [f"id {i}" for i in range(1001)]
WRONG = {
    "numbers": (tables(["0.5", "2"]), {}, "labels are numbers, such as 0.5: set task.reg"),
    "too many": (tables(TOO_MANY), {}, "train.csv: 1001 different labels.*is data.label the right"),
    "one": (tables(["a", "a"]), {}, "all labels are 'a'"),
    "no training split": ({}, {}, "no labelled training split.*task.labels"),
    "unlabelled": ({"train": Table(["a"])}, {}, "no labelled training split.*task.labels"),
    "twice": ({}, {"labels": ("a", "b", "a")}, "task.labels: 'a' comes twice"),
    "weights": ({}, {"labels": CLASSES, "class_weights": (1.0,)}, "has 1 numbers for 4 classes"),
    "negative": ({}, {"labels": ("a", "b"), "class_weights": (1.0, -1.0)}, "weights are above 0"),
    "nan": ({}, {"labels": ("a", "b"), "class_weights": (1.0, np.nan)}, "weights are above 0"),
    "smoothing": ({}, {"labels": CLASSES, "label_smoothing": 1.0}, r"1.0 is not in \[0, 1\)"),
    "regression": ({}, {"regression": True, "label_smoothing": 0.1}, "do not go with a regression"),
    "glue": (tables([0, 1], glue="rte"), {"labels": CLASSES}, "glue/rte has labels of its own"),
    "glue classes": (tables([0], glue="rte"), {"regression": True}, "glue/rte has labels of"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "settings", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit(data, settings, message):
    with pytest.raises(Mistake, match=message):
        make(data, **settings)


def test_unknown_labels_are_named_with_their_line():
    task = make(tables(["positive", "negative"]))
    other = Table(
        ["a", "b"], None, ["positive", "positve"], source="dev.csv", numbers=[2, 5], unit="line"
    )
    with pytest.raises(
        Mistake, match="dev.csv line 5: unknown label 'positve'; did you mean 'positive'"
    ):
        task.targets(other)
    task = make({}, regression=True)
    for label in ("positive", "nan", "inf"):
        with pytest.raises(Mistake, match=f"mine row 0: label '{label}' is no number"):
            task.targets(Table(["a"], None, [label], source="mine"))


# Metrics


def metrics(task, predicted, targets):
    logits = np.eye(task.num_outputs, dtype=np.float32)[predicted] * 50
    return task.metrics({"logits": logits}, np.array(targets))


def test_metrics_of_two_classes():
    task = make({}, labels=("no", "yes"))
    found = metrics(task, [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 0])
    assert task.metric == ("accuracy", "max")
    assert list(found) == list(task.directions)
    assert {name: kind for name, kind in task.directions.items() if kind == "min"} == {
        "loss": "min"
    }
    assert found["accuracy"] == 5 / 8
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert found["macro_f1"] == pytest.approx((4 / 7 + 6 / 9) / 2)
    assert found["matthews"] == pytest.approx((2 * 3 - 2 * 1) / np.sqrt(4 * 3 * 5 * 4))
    assert found["loss"] == pytest.approx(50 * 3 / 8)


def test_metrics_of_more_classes():
    task = make({}, labels=CLASSES)
    found = metrics(task, [0, 1, 2, 2], [0, 1, 2, 1])
    assert set(found) == {"accuracy", "macro_f1", "matthews", "loss"}
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)


def test_metrics_of_a_regression():
    task = make({}, regression=True)
    targets = np.array([1.0, 2.0, 3.0, 4.0])
    found = task.metrics({"logits": np.array([[1.0], [4.0], [9.0], [16.0]])}, targets)
    assert task.metric == ("pearson", "max")
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(targets**2, targets)[0, 1])
    assert found["mean_squared_error"] == found["loss"] == (0 + 4 + 36 + 144) / 4
    constant = task.metrics({"logits": np.ones((4, 1))}, targets)
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "metric", "also"),
    [
        ("cola", "matthews", set()),
        ("sst2", "accuracy", set()),
        ("mrpc", "score", {"accuracy", "f1"}),
        ("stsb", "score", {"pearson", "spearman"}),
        ("qqp", "score", {"accuracy", "f1"}),
        ("mnli", "accuracy", set()),
        ("qnli", "accuracy", set()),
        ("rte", "accuracy", set()),
        ("wnli", "accuracy", set()),
    ],
)
def test_metrics_of_glue(name, metric, also):
    labels = glue.TASKS[name].labels
    data = tables([0, 1], names=labels, glue=name)
    task = make(data)
    assert (task.labels, task.metric) == (labels, (metric, "max"))
    assert set(task.directions) == {metric, "loss"} | also
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (20, task.num_outputs))
    targets = rng.integers(0, task.num_outputs, 20) if labels else rng.normal(0, 1, 20)
    found = task.metrics({"logits": logits}, targets)
    assert set(found) == set(task.directions)
    assert all(type(value) is float for value in found.values())
    if also:
        assert found["score"] == pytest.approx(np.mean([found[name] for name in also]))


def test_an_unlabelled_split_is_not_measured():
    task = make({}, labels=CLASSES)
    assert task.metrics({"logits": np.zeros((3, 4))}, None) == {}


# Predictions


def test_decode():
    task = make({}, labels=("no", "yes"))
    first, second = task.decode({"logits": np.array([[0.0, 0.0], [1.0, 3.0]], np.float32)})
    assert first == {"label": "no", "scores": {"no": 0.5, "yes": 0.5}, "logits": [0.0, 0.0]}
    assert second["label"] == "yes"
    assert second["scores"]["yes"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert make({}, regression=True).decode({"logits": np.array([[2.5]])}) == [
        {"label": 2.5, "logits": [2.5]}
    ]


@pytest.mark.parametrize(
    ("name", "split", "file", "written"),
    [
        ("cola", "test", "CoLA.tsv", ["0", "1"]),
        ("glue/sst2", "test", "SST-2.tsv", ["0", "1"]),
        ("mrpc", "test", "MRPC.tsv", ["0", "1"]),
        ("qqp", "test", "QQP.tsv", ["0", "1"]),
        ("wnli", "test", "WNLI.tsv", ["0", "1"]),
        ("qnli", "test", "QNLI.tsv", ["entailment", "not_entailment"]),
        ("rte", "test", "RTE.tsv", ["entailment", "not_entailment"]),
        ("mnli", "test_matched", "MNLI-m.tsv", ["entailment", "neutral", "contradiction"]),
        ("mnli", "test_mismatched", "MNLI-mm.tsv", ["entailment", "neutral", "contradiction"]),
    ],
)
def test_submissions(name, split, file, written, tmp_path):
    outputs = {"logits": np.eye(len(written))[::-1]}
    path = glue.write_submission(tmp_path / "new", name, split, outputs)
    assert path == tmp_path / "new" / file
    rows = [f"{row}\t{label}\n" for row, label in enumerate(written[::-1])]
    assert path.read_text() == "index\tprediction\n" + "".join(rows)


def test_submission_of_scores(tmp_path):
    path = glue.write_submission(tmp_path, "stsb", "test", {"logits": [[-0.3], [2.34567], [5.2]]})
    assert path.name == "STS-B.tsv"
    assert path.read_text() == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnli", "test", "no test split 'test' of mnli; did you mean 'test_matched'"),
        ("rte", "validation", "no test split 'validation' of rte"),
        ("imdb", "test", "no GLUE task 'imdb'"),
    ],
)
def test_no_submission(name, split, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        glue.write_submission(tmp_path, name, split, {"logits": np.zeros((1, 2))})


# Tasks by name


def test_tasks_are_found_by_name():
    assert "text_classification" in tasks.names()
    with pytest.raises(Mistake, match="did you mean 'text_classification'"):
        tasks.get("text_classificaton")


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_is_made_from_keywords(name):
    parameters = list(inspect.signature(tasks.get(name).make).parameters.values())
    given = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert given in (["tables"], ["tables", "size"])
    for parameter in parameters[len(given) :]:
        assert parameter.annotation is not parameter.empty
        assert parameter.default is not parameter.empty
