"""How far a run is and what it does next: its plan, its progress, its first gradients. No files.

`Plan` is made from the config; `Progress` is what a checkpoint holds beside the state. Together
they decide when the loop logs, evaluates, saves and ends.
"""

import dataclasses
import math
import typing

import jax

from bmft.errors import Mistake, nearest
from bmft.run import warn

EVALUATIONS = 5  # of a run whose eval.every is open
FIRST_STEPS = 5  # whose gradients must not all be zero
LAST_VALUE = ("learning_rate",)  # numbers of a step that a row does not average


def total_steps(config, steps_per_epoch):
    """How many steps a run makes: train.steps, or those of train.epochs, at least one."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, round(config.train.epochs * steps_per_epoch))


class Plan(typing.NamedTuple):
    """When what happens; steps are counted as done, so the first event can be at step 1."""

    total: int
    log_every: int
    evaluate_every: int
    save_every: int
    patience: int  # evaluations without a better metric before the end; 0: no end
    validation: tuple  # splits evaluated on the way
    tests: tuple  # splits evaluated at the end

    def logs(self, step):
        return step % self.log_every == 0 or step == self.total

    def evaluates(self, progress):
        due = progress.step % self.evaluate_every == 0 or progress.step == self.total
        return bool(self.validation) and due and progress.evaluated < progress.step

    def saves(self, progress):
        best = progress.best is not None and progress.best["step"] == progress.step
        due = progress.step % self.save_every == 0 or best or self.over(progress)
        return due and progress.step > 0 and not progress.is_saved

    def over(self, progress):
        out_of_patience = self.patience and progress.stale >= self.patience
        return progress.step >= self.total or bool(out_of_patience)

    def next_event(self, step):
        """The first step after `step` where something may be due."""
        periods = (self.log_every, self.evaluate_every, self.save_every)
        return min(self.total, *((step // period + 1) * period for period in periods))


def make_plan(config, steps_per_epoch, splits):
    """The `Plan` of a config. Raises Mistake if early stopping has nothing to look at."""
    total = total_steps(config, steps_per_epoch)
    tests = tuple(split for split in splits if split.startswith("test"))
    validation = tuple(split for split in splits if split not in tests)
    if config.train.early_stopping and not validation:
        raise Mistake("train.early_stopping needs a validation split; the data has none")
    evaluate_every = config.eval.every or math.ceil(total / EVALUATIONS)
    return Plan(
        total=total,
        log_every=config.log.every,
        evaluate_every=evaluate_every,
        save_every=config.checkpoint.every or evaluate_every,
        patience=config.train.early_stopping,
        validation=validation,
        tests=tests,
    )


class NotFinite(Exception):
    """Says which number of which step is not finite."""


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds beside the state. All but `wall` and the pace is a function of the
    config, and floats survive JSON, so a continued run goes on as if it had not been stopped."""

    step: int = 0  # steps done
    evaluated: int = 0  # the last step that was evaluated
    sums: dict = dataclasses.field(default_factory=dict)  # since the last row: number x weight
    weight: float = 0.0
    row: dict = dataclasses.field(default_factory=dict)  # the last one
    still: list | None = None  # per moving leaf: no gradient so far
    results: dict = dataclasses.field(default_factory=dict)  # the last evaluation's, by split
    best: dict | None = None
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0  # of training, compilation left out
    steps: int = 0  # made in those seconds
    examples: float = 0.0
    wall: float = 0.0

    loss = math.nan  # of the last step
    _saved = None

    def add_step(self, metrics):
        """Count a step in; returns its examples. Raises NotFinite, so a bad state is not saved."""
        numbers = {name: value for name, value in metrics.items() if value.ndim == 0}
        numbers = {name: float(value) for name, value in jax.device_get(numbers).items()}
        weight = numbers.pop("weight")
        examples = numbers.pop("examples", weight)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers.get(name, 0.0)):
                raise NotFinite(f"{name} is {numbers[name]} at step {self.step + 1}")
        for name in sorted(numbers, key=lambda name: (name != "loss", name)):
            value = numbers[name]
            if name in LAST_VALUE:
                self.sums[name] = value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.weight += weight
        self.step += 1
        self.loss = numbers["loss"]
        return examples

    def take_row(self):
        """The means since the last row."""
        self.row = {
            name: value if name in LAST_VALUE else value / self.weight
            for name, value in self.sums.items()
        }
        self.sums, self.weight = {}, 0.0
        return self.row

    def add_evaluation(self, results, metric):
        """Note the results and whether they are the best so far, by the first split."""
        name, direction = metric
        split, values = next(iter(results.items()))
        if name not in values:
            raise Mistake(f"eval.metric {name!r} is none of {split}; {nearest(name, values)}")
        self.results, self.evaluated = results, self.step
        value, known = values[name], self.best and self.best["value"]
        better = known is None or (value > known if direction == "max" else value < known)
        if better and math.isfinite(value):
            best = {"metric": [name, direction], "value": value, "step": self.step}
            self.best, self.stale = best | {"results": results}, 0
        else:
            self.stale += 1

    def chosen(self, best):
        """The step to export: that of the best evaluation, if wanted and there is one."""
        return self.best["step"] if best and self.best else self.step

    def mark_saved(self):
        self._saved = (self.step, self.evaluated)

    @property
    def is_saved(self):
        return self._saved == (self.step, self.evaluated)

    def to_json(self):
        return dataclasses.asdict(self)


class Gradients:
    """Looks whether a gradient reaches every moving leaf in the first steps."""

    def __init__(self, paths, labels):
        self._paths = list(paths)  # in the order of `grad_norms`
        self._labels = labels

    def watch(self, progress, metrics):
        """Raises Mistake if none reached any leaf of a label; warns of single leaves."""
        if progress.step > FIRST_STEPS:
            return
        zero = [norm == 0 for norm in jax.device_get(metrics["grad_norms"]).tolist()]
        before = progress.still or [True] * len(zero)
        progress.still = [a and b for a, b in zip(before, zero, strict=True)]
        still = [path for path, none in zip(self._paths, progress.still, strict=True) if none]
        if progress.step < FIRST_STEPS or not still:
            return
        for label in sorted({self._labels[path] for path in still if path in self._labels}):
            leaves = [path for path in self._paths if self._labels.get(path) == label]
            if set(leaves) <= set(still):
                raise Mistake(
                    f"no gradient reached any leaf of {label!r} in the first {FIRST_STEPS} steps: "
                    f"{', '.join(leaves)} would not train"
                )
        warn(f"no gradient reached {', '.join(still)} in the first {FIRST_STEPS} steps")
