"""What the field `config` of an AdapterHub adapter says of its bottlenecks, as arguments of
`bmft.peft.adapter.make`, and back.

    mh_adapter, output_adapter              after the attention, after the MLP
    is_parallel                             beside the MLP: it reads the MLP's input
    original_ln_before                      it reads the normed sum, not the part's output
    residual_before_ln                      it is added to the part's output all the same

A field that could change the outputs and says anything else is refused by its name; what matters
in training alone is not looked at.
"""

import json

from bmft import layers
from bmft.errors import Mistake, nearest
from bmft.peft import adapter, reading

LARGEST = 10**9  # reduction_factor; whatever is more than the width leaves one number
# A file without a version is from before these were renamed.
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# The fields of `config` that are read: {field: (types, the package's default)}.
READ = {
    "is_parallel": ((bool,), False),
    "mh_adapter": ((bool,), None),
    "output_adapter": ((bool,), None),
    "original_ln_before": ((bool,), False),
    "residual_before_ln": ((bool, str), True),
    "reduction_factor": ((int, float, dict), None),
    "non_linearity": ((str,), None),
    "scaling": ((int, float), 1.0),
    "leave_out": ((list[int],), []),
    "init_weights": ((str,), "bert"),
}
# What they say of each kind, as the package writes it first; of a parallel adapter the last two
# mean nothing.
KINDS = {
    "houlsby": {
        "mh_adapter": (True,),
        "output_adapter": (True,),
        "original_ln_before": (False,),
        "residual_before_ln": (True, False),
    },
    "pfeiffer": {
        "mh_adapter": (False,),
        "output_adapter": (True,),
        "original_ln_before": (True,),
        "residual_before_ln": (True,),
    },
    "parallel": {"mh_adapter": (False,), "output_adapter": (True,)},
}
# Those of what our adapters never do, with the value that says so.
NEVER = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "phm_layer": False,
}
# Those without effect on a trained adapter of an encoder that does none of it, and their defaults.
IGNORED = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "stochastic_depth": 0.0,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}


def encode(chosen, kind, left_out):
    """All fields of `config`, of a `bmft.peft.adapter.Kind` and what the kind is called."""
    defaults = {field: default for field, (_, default) in READ.items()}
    return {
        **NEVER,
        **IGNORED,
        **defaults,
        **{field: values[0] for field, values in KINDS[kind].items()},
        "is_parallel": kind == "parallel",
        "reduction_factor": chosen.reduction,
        "non_linearity": chosen.nonlinearity,
        "scaling": float(chosen.scaling),
        "init_weights": chosen.init,
        "leave_out": sorted(left_out),
    }


def decode(file, fields, model):
    """The arguments of make that the `config` among the fields of a file says.

    Raises Mistake, naming file and field, for what our adapters do not compute.
    """
    config = _checked(file, fields["config"])
    kind = _kind(file, config)
    activation = config["non_linearity"].lower()
    if "version" not in fields:
        activation = OLD_ACTIVATIONS.get(activation, activation)
    if activation not in layers.ACTIVATIONS:
        near = nearest(activation, layers.ACTIVATIONS)
        raise _refusal(file, "non_linearity", config["non_linearity"], near)
    if config["init_weights"] not in adapter.INITS:
        near = nearest(config["init_weights"], adapter.INITS)
        raise _refusal(file, "init_weights", config["init_weights"], near)
    if not -1e38 < config["scaling"] < 1e38:  # of float32
        raise _refusal(file, "scaling", config["scaling"], "it must be finite")
    left_out = tuple(sorted(set(config["leave_out"])))
    return {
        "kind": kind,
        "reduction": _reduction(file, config["reduction_factor"], left_out, model),
        "nonlinearity": activation,
        "init": config["init_weights"],
        "scaling": float(config["scaling"]),
        "norms": False,
        "leave_out": left_out,
    }


def _checked(file, config):
    """{field: value} of READ, with defaults; Mistake for whatever else says something."""
    architecture = config.get("architecture")
    if architecture is not None:
        raise _refusal(file, "architecture", architecture, "only bottleneck adapters are read")
    for field, value in config.items():
        if field in NEVER and value != NEVER[field]:
            raise _refusal(file, field, value, f"only {json.dumps(NEVER[field])} is known here")
        known = field in READ or field in IGNORED or field in NEVER
        if not known and value not in (None, False, "", [], {}):
            raise _refusal(file, field, value, "which is not known here")
    found = {}
    for field, (types, default) in READ.items():
        value = found[field] = config.get(field, default)
        if not any(reading.is_of(value, kind) for kind in types):
            raise _refusal(file, field, value, f"needs {' or '.join(map(_called, types))}")
    return found


def _kind(file, config):
    sequential = "pfeiffer" if config["original_ln_before"] else "houlsby"
    kind = "parallel" if config["is_parallel"] else sequential
    for field, wanted in KINDS[kind].items():
        if config[field] not in wanted:
            of = "is_parallel" if kind == "parallel" else "is_parallel and original_ln_before"
            needs = " or ".join(map(json.dumps, wanted))
            raise _refusal(file, field, config[field], f"with such {of} only {needs} is known here")
    return kind


def _reduction(file, factor, left_out, model):
    """The whole number by which the width is divided in each layer: `factor`, or one that leaves as
    many numbers."""
    width, factors = model.config.width, [factor]
    if isinstance(factor, dict):
        every = range(model.names.layers)
        every = [layer for layer in every if layer not in left_out] or every
        factors = [factor.get(str(layer), factor.get("default")) for layer in every]
    for one in factors:
        if not (reading.is_of(one, int) or reading.is_of(one, float)) or not one >= 1:
            why = "needs a number of 1 or more for each layer"
            raise _refusal(file, "reduction_factor", factor, why)
    sizes = {max(1, int(width // one)) for one in factors}
    if len(sizes) != 1:
        raise _refusal(file, "reduction_factor", factor, "only adapters of one size are known here")
    size = sizes.pop()
    for whole in (*(int(min(one, LARGEST)) for one in factors), width // size):
        if max(1, width // whole) == size:
            return whole
    raise _refusal(file, "reduction_factor", factor, f"no whole number leaves {size} of {width}")


def _called(kind):
    names = {bool: "true or false", str: "a text", dict: "a dict", list[int]: "a list of layers"}
    return names.get(kind, "a number")


def _refusal(file, field, value, why):
    return Mistake(f"{file}: config.{field} is {json.dumps(value)}; {why}")
