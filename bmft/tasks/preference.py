"""Preferences: of two answers to a prompt, one is made likelier than the other.

    method      dpo     -log s(beta (c - r))                 arXiv:2305.18290, equation 7
                ipo     (c / n_c - r / n_r - 1 / (2 beta))^2 arXiv:2310.12036, equation 17
                simpo   -log s(beta (l_c / n_c - l_r / n_r) - gamma)   arXiv:2405.14734, equation 6
    beta        how far the model may go from the reference; of ipo the paper's tau
    gamma       simpo: the margin
    smoothing   dpo: the share of pairs that are taken to be the wrong way round

where s is the logistic function, l_c and l_r are the log-likelihoods of the chosen and the rejected
answer, n_c and n_r their tokens, c = l_c - the reference's l_c, and r likewise. IPO is by token, as
trl has it by word of its authors; the paper's sums grow with the length of an answer.

The reference is the base without what methods add: forward(batch, adapter=False), no second model.
So nothing of the base itself may move; `check_moving` refuses what would. SimPO has none.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bmft.data import chat
from bmft.data.dialogs import Dialogs
from bmft.errors import Mistake, nearest
from bmft.tasks import Task
from bmft.tasks.causal_lm import by_segment, readers, show, style_of

EXAMPLES = Dialogs
METHODS = ("dpo", "ipo", "simpo")
NAMES = {"accuracy": "max", "margin": "max", "chosen": "max", "rejected": "min", "loss": "min"}


def make(
    tables,
    *,
    method: str = "dpo",
    beta: float = 0.1,
    gamma: float = 1.0,
    smoothing: float = 0.0,
    template: str | None = None,
    separator: str | None = None,
):
    """The `Task` of `{split: Dialogs}` with rejected answers, or of none. Raises Mistake."""
    _check(method, beta, gamma, smoothing)
    for table in tables.values():
        if table.rejected is None:
            raise Mistake(f"{table.source} holds no preference pairs: chosen and rejected")
        chat.check_style(style_of(table, template, separator, "last"))
    encode, prompts = readers(template, separator, "last")

    def costs(sums):
        return pair_costs(sums, method, beta, gamma, smoothing)

    def loss(forward, batch, key):
        cost, margin = costs(log_likelihoods(forward, batch, method != "simpo", train=True))
        real = batch["weights"]
        sums = {"accuracy": margin > 0, "margin": margin, "examples": 1.0}
        return ((cost * real).sum(), real.sum()), {
            name: (real * value).sum() for name, value in sums.items()
        }

    def outputs(forward, batch):
        sums = log_likelihoods(forward, batch, method != "simpo", train=False)
        cost, margin = costs(sums)
        return {**sums, "cost": cost, "margin": margin}

    return Task(
        name="preference",
        labels=None,
        num_outputs=None,
        heads=(),
        metric=("accuracy", "max"),
        directions=NAMES,
        targets=lambda table: None,
        loss=loss,
        outputs=outputs,
        metrics=lambda outputs, targets: metrics(outputs),
        decode=decode,
        encode=encode,
        show=show,
        prompts=prompts,
        check_moving=check_moving if method != "simpo" else None,
    )


def _check(method, beta, gamma, smoothing):
    if method not in METHODS:
        raise Mistake(f"task.method={method!r}; {nearest(method, METHODS)}")
    if not 0 < beta < float("inf"):
        raise Mistake(f"task.beta={beta!r}: needs a number above 0")
    if not 0 <= gamma < float("inf"):
        raise Mistake(f"task.gamma={gamma!r}: needs a number of at least 0")
    if not 0 <= smoothing < 0.5 or (smoothing and method != "dpo"):
        raise Mistake(f"task.smoothing={smoothing!r}: needs a share below 0.5, and method dpo")


def check_moving(moving):
    """Raise Mistake if one of the paths `moving` is the base's own: without the adapter, that would
    not be the base any more."""
    own = sorted(path for path in moving if path.startswith("params/"))
    if own:
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        raise Mistake(
            f"the reference is the base without its adapter, but {own[0]}{more} of the base itself "
            "moves; use methods that only add leaves, such as lora, or task.method=simpo"
        )


# --- loss ------------------------------------------------------------------------------------


def log_likelihoods(forward, batch, reference, train):
    """Of each pair, float32 [R, K]: chosen, rejected (log-likelihoods), their chosen_tokens and
    rejected_tokens, and with `reference` the base's reference_chosen and reference_rejected."""
    learned, slots = batch["targets"] >= 0, batch["index"].shape[1]

    def pairs(values, name):
        sums = by_segment(jnp.where(learned, values, 0.0), batch["segments"], 2 * slots)
        return {name.format("chosen"): sums[:, 0::2], name.format("rejected"): sums[:, 1::2]}

    sums = pairs(-forward(batch, train=train), "{}") | pairs(learned, "{}_tokens")
    if reference:
        base = jax.lax.stop_gradient(forward(batch, train=False, adapter=False))
        sums |= pairs(-base, "reference_{}")
    return sums


def pair_costs(sums, method, beta, gamma=0.0, smoothing=0.0):
    """(the loss of each pair, by how much the chosen answer is preferred), of `log_likelihoods`.

    The second is beta (c - r) of dpo, c and r by token of ipo, and beta times the log-likelihoods
    by token of simpo: the differences of what the papers call implicit rewards.
    """
    chosen, rejected = sums["chosen"], sums["rejected"]
    if method != "simpo":
        chosen = chosen - sums["reference_chosen"]
        rejected = rejected - sums["reference_rejected"]
    if method != "dpo":
        chosen = chosen / jnp.maximum(sums["chosen_tokens"], 1.0)  # of an empty slot 0
        rejected = rejected / jnp.maximum(sums["rejected_tokens"], 1.0)
    difference = chosen - rejected
    margin = beta * difference
    if method == "ipo":
        return (difference - 1 / (2 * beta)) ** 2, margin
    shift = gamma if method == "simpo" else 0.0
    right, wrong = (-jax.nn.log_sigmoid(sign * (margin - shift)) for sign in (1, -1))
    return (1 - smoothing) * right + smoothing * wrong, margin


# --- metrics ---------------------------------------------------------------------------------


def metrics(outputs):
    """{name: float}: loss; accuracy, the share of pairs with a margin above 0; means of margin, and
    of the log-likelihoods of chosen and rejected answers."""
    found = {
        name: outputs[name].mean(dtype=np.float64) for name in ("margin", "chosen", "rejected")
    }
    found["loss"] = outputs["cost"].mean(dtype=np.float64)
    found["accuracy"] = (outputs["margin"] > 0).mean()
    return {name: float(value) for name, value in found.items()}


def decode(outputs):
    """A dict an example: chosen and rejected, log-likelihoods, and the margin between them."""
    names = ("chosen", "rejected", "margin")
    rows = zip(*(outputs[name].tolist() for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]
