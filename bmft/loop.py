"""The loop every experiment calls: restore, step, log, evaluate, checkpoint, stop early, end.

    run = open_run(config, workdir or default_workdir(...), name, fingerprint)
    if run.finished: return 0
    ...                                      # load the model, make state, frozen and step
    outcome = loop.run(config, run, state=state, frozen=frozen, step=step, ...)
    export.write(...outcome.state...)
    run.finish({**outcome.report, "trainable_params": ..., "total_params": ...})

A step's batch and key are functions of its number, and what else decides the course of a run is in
`Progress`, which each checkpoint holds. So a run that was killed at any moment ends as if it had
not been: the same leaves, the same metrics.jsonl. Where a step ends, things happen in a fixed
order: the row of the log, the evaluation, the checkpoint. A state that SIGTERM cut off from its
evaluation is saved without it, and evaluated first when the run continues.

If train.steps grows, a finished run goes on from its last step. A schedule that depends on the
number of steps is then another one: the rate jumps back up, and the end differs from a run that was
that long from the start.
"""

import contextlib
import dataclasses
import itertools
import resource
import sys
import time
import typing

import jax
from jax.experimental import multihost_utils

from bmft import processes, tree
from bmft.checkpoint import Checkpoints
from bmft.errors import Mistake, Stopped, on_sigterm
from bmft.log import Log
from bmft.progress import Gradients, NotFinite, Plan, Progress, make_plan
from bmft.run import warn


class Outcome(typing.NamedTuple):
    """What a run ends with."""

    state: typing.Any  # the one to export: the best, or the last (export.best)
    step: int  # how many steps that one has made
    metrics: dict  # its {split: {name: float}}; train: the last row's
    report: dict  # what report.json says of the loop: without trainable_params, total_params


def run(
    config, run, *, state, frozen, step, batches, evaluate, metric, fingerprint,
    labels=None, splits=("validation", "test"),
):  # fmt: skip
    """Train from where the run directory stands to the end; returns an `Outcome`.

    state: NamedTuple with `step` (int32 scalar) and `moving` (nested dicts), any arrays else. It is
        donated; where there is a checkpoint it only gives structure and shardings.
    step(state, frozen, batch) -> state, metrics: scalars `loss`, `weight` (examples) and others,
        `grad_norms` [moving leaves]. Rows average the scalars by weight, but for `LAST_VALUE`.
    batches: `.at(step)`, `.steps_per_epoch`, `.padding_share`, `.tokens_per_step` (None:
        they are no text).
    evaluate(state, frozen, split, stop) -> {name: float}, or None if `stop()`, to be asked before
        each batch, was true: the same evaluation is made again when the run continues.
    metric: (name, "max" or "min"), of the first split that is evaluated on the way.
    splits: those that begin with `test` are evaluated once, at the end, on the state to export.
    fingerprint: as for `open_run`. labels: {path of a moving leaf: optimizer label}.

    Raises Stopped after SIGTERM, the state saved; Mistake if the loss is not finite, if no gradient
    reaches a label, if the checkpoints are damaged, or if a file cannot be written.
    """
    plan = make_plan(config, batches.steps_per_epoch, splits)
    with (
        run.lock(),
        _Sigterm() as stop,
        _Compilations() as compilations,
        _open_checkpoints(config, run, fingerprint) as checkpoints,
        Log(run.path if processes.index() == 0 else None, config.log, plan.total) as log,
    ):
        state, progress = _restore(checkpoints, state, metric)
        log.begin(progress.step, progress.evaluated)
        loop = _Loop(
            plan=plan,
            progress=progress,
            metric=metric,
            evaluate=lambda state, split: evaluate(state, frozen, split, stop.requested),
            gradients=Gradients(tree.flatten(state.moving), labels or {}),
            pace=_Pace(plan.total, progress, compilations),
            stop=stop,
            checkpoints=checkpoints,
            log=log,
            wall=progress.wall - run.opened,
        )
        with loop.told_at_its_end(run.checkpoints.parent):
            state = loop.train(lambda state, at: step(state, frozen, batches.at(at)), state)
            state, at, metrics = loop.conclude(state, config.export.best)
        log.draw_curves()
        return Outcome(state, at, metrics, loop.report(batches, compilations, metrics))


def exported(config, run, state, *, fingerprint):
    """The state that a finished run exported, in place of `state`, and its step.

    For exporting again, say with export.merged: nothing is trained, logged or evaluated. Raises
    Mistake if there is no complete checkpoint, or it is damaged.
    """
    with _open_checkpoints(config, run, fingerprint) as checkpoints:
        saved = checkpoints.newest()
        if saved is None:
            raise Mistake(f"{run.checkpoints.parent} has no checkpoint to export")
        step = Progress(**saved.progress).chosen(config.export.best)
        return _exchange(checkpoints, step, state), step


# The course of a run


@dataclasses.dataclass
class _Loop:
    """What a run needs at every step, and the loop itself."""

    plan: Plan
    progress: Progress
    metric: tuple
    evaluate: typing.Callable  # (state, split) -> {name: float}
    gradients: Gradients
    pace: "_Pace"
    stop: "_Sigterm"
    checkpoints: Checkpoints
    log: Log
    wall: float  # seconds of the sessions before, less the clock when this one began

    def train(self, step, state):
        """The state at the end of the plan. Where SIGTERM ends it before, the state is saved."""
        plan, progress = self.plan, self.progress
        try:
            while True:
                if plan.evaluates(progress):
                    results = self.assess(state, plan.validation, progress.step)
                    progress.add_evaluation(results, self.metric)
                if plan.saves(progress):
                    self.save(state)
                if plan.over(progress):
                    return state
                self.pace.start()
                until = plan.next_event(progress.step)
                steps = _steps(step, state, progress.step, until, self.stop)
                for state, metrics in steps:  # noqa: B007, the state is for what follows
                    self.follow(metrics)
                if progress.weight and plan.logs(progress.step):
                    self.log.row(progress.step, "train", progress.take_row(), self.pace.text())
                if self.stop.requested():
                    raise _Interrupted
        except _Interrupted:
            if progress.step and not progress.is_saved:
                self.save(state)
            raise

    def follow(self, metrics):
        """Take note of a step's numbers, if they have come."""
        examples = None
        if metrics is not None:
            examples = self.progress.add_step(metrics)
            self.gradients.watch(self.progress, metrics)
        self.pace.lap(examples)
        self.log.tick(self.progress.step, self.progress.loss, self.pace.text())

    def assess(self, state, splits, at):
        """Evaluate all of `splits`, then log them: {split: {name: float}}."""
        results = {}
        for split in splits:
            values = self.evaluate(state, split)
            if values is None:
                raise _Interrupted
            results[split] = {name: float(value) for name, value in values.items()}
        for split, values in results.items():
            self.log.row(at, split, values)
        return results

    def save(self, state):
        progress = self.progress
        progress.wall = self.wall + time.monotonic()
        best = progress.best and progress.best["step"]
        self.checkpoints.save(progress.step, state, progress.to_json(), best)
        progress.mark_saved()

    def conclude(self, state, best):
        """The state to export, its step, and its metrics with those of the test splits."""
        progress = self.progress
        at = progress.chosen(best)
        if at != progress.step:
            try:
                state = _exchange(self.checkpoints, at, state)
            except Mistake as mistake:
                hint = "--config.export.best=False exports the last step"
                raise Mistake(f"{mistake}; {hint}") from mistake
        of_best = progress.best is not None and at == progress.best["step"]
        metrics = {"train": progress.row} | (
            progress.best["results"] if of_best else progress.results
        )
        metrics |= self.assess(state, self.plan.tests, at)
        self.checkpoints.wait()
        return state, at, metrics

    @contextlib.contextmanager
    def told_at_its_end(self, path):
        """What stops a run early, in words that say where it stands."""
        try:
            yield
        except _Interrupted:
            self.checkpoints.wait()
            step = self.progress.step
            where = f"at step {step} of {self.plan.total}" if step else "before the first step"
            saved = f", the state is saved in {path}" if step else ""
            raise Stopped(f"{where}{saved}; run the same command again to continue") from None
        except NotFinite as fault:
            raise Mistake(f"{fault}; {self.checkpoints.last()}") from None

    def report(self, batches, compilations, metrics):
        """What report.json says of the loop. Compilations and memory are this process's."""
        progress, pace = self.progress, self.pace
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        best = progress.best and {name: progress.best[name] for name in ("metric", "value", "step")}
        return {
            "metrics": metrics,
            "best": best,
            "steps": progress.step,
            "stopped_early": progress.step < self.plan.total,
            "examples_per_second": pace.examples_per_second,
            "tokens_per_second": (batches.tokens_per_step or 0.0) * pace.steps_per_second,
            "padding_share": batches.padding_share,
            "compile_seconds": compilations.seconds,
            "compilations": compilations.count,
            "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
            "wall_seconds": self.wall + time.monotonic(),
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }


def _steps(step, state, at, until, stop):
    """Make the steps from `at` to `until`, fewer if SIGTERM comes: yields (state, metrics).

    The metrics are those of the step before (None at first): they are fetched while the next one
    runs, so the device does not wait for the host. At the end the last ones follow.
    """
    late = None
    while at < until and not stop.requested():
        state, metrics = step(state, at)
        yield state, late
        late = metrics
        at += 1
    if late is not None:
        yield state, late


def _open_checkpoints(config, run, fingerprint):
    keep = config.checkpoint.keep
    return Checkpoints(run.checkpoints, fingerprint=fingerprint, keep=keep)


def _exchange(checkpoints, step, state):
    """The state of a checkpoint for `state`, whose memory is free before the other comes."""
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return checkpoints.restore(step, like)


def _restore(checkpoints, state, metric):
    """The state and the `Progress` to go on from: the newest checkpoint's, or the beginning's."""
    saved = checkpoints.newest()
    if saved is None:
        return state, Progress()
    state = _exchange(checkpoints, saved.step, state)
    progress = Progress(**saved.progress)
    progress.mark_saved()
    if progress.best and progress.best["metric"] != list(metric):
        warn(f"the best checkpoint was by {progress.best['metric']}: the search for it begins anew")
        progress.best, progress.stale = None, 0
    return state, progress


# What is watched on the way


class _Interrupted(BaseException):
    """SIGTERM came, and this is a moment to stop at."""


class _Sigterm:
    """Takes note of SIGTERM, so that a run stops where its state is whole; a context manager.

    Several processes agree on the moment through JAX's preemption service. It has the signal then,
    as jax.distributed.initialize was called after `errors.command` took it (bmft/processes.py).
    """

    def __init__(self):
        self._came = False
        self._agree = jax.process_count() > 1

    def __enter__(self):
        self._undo = (lambda: None) if self._agree else on_sigterm(self._note)
        return self

    def __exit__(self, kind, error, trace):
        self._undo()
        if self._came and kind is None:
            raise Stopped("after the last step; run the same command again to finish")

    def _note(self, signum, frame):
        self._came = True

    def requested(self):
        """Is the run to stop? Every process must ask equally often: they agree by that number."""
        if self._agree and not self._came:
            self._came = multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._came


_asked = itertools.count(1)  # over all runs of a process: for JAX a number must not come again


class _Compilations:
    """Counts what XLA compiles in its context, in this process; a cached program counts too."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def _note(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += seconds

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, kind, error, trace):
        jax.monitoring.unregister_event_duration_listener(self._note)


class _Pace:
    """Measures a run's steps into its `Progress`, but for those in which something compiles."""

    def __init__(self, total, progress, compilations):
        self._total = total
        self._progress = progress
        self._compilations = compilations

    def start(self):
        """After a pause that does not count."""
        self._since = time.monotonic()
        self._compiled = self._compilations.count

    def lap(self, examples):
        """Count the time since the last lap; examples: of the step that has ended, or None."""
        if self._compilations.count == self._compiled:
            self._progress.seconds += time.monotonic() - self._since
            self._progress.steps += examples is not None
            self._progress.examples += examples or 0.0
        self.start()

    @property
    def examples_per_second(self):
        return self._progress.examples / self._progress.seconds if self._progress.seconds else 0.0

    @property
    def steps_per_second(self):
        return self._progress.steps / self._progress.seconds if self._progress.seconds else 0.0

    def text(self):
        if not self.steps_per_second:
            return ""
        left = round((self._total - self._progress.step) / self.steps_per_second)
        minutes = f"{left // 60 % 60}:{left % 60:02}"
        clock = f"{left // 3600}:{minutes:0>5}" if left >= 3600 else minutes
        return f"{self.examples_per_second:.4g} examples/s  {clock} left"
