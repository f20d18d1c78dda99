"""Every method on one task, with one budget: tweets, minilm, 64 steps of 32, two seeds.

    ./run.sh experiments/compare_methods.py
    ./run.sh experiments/compare_methods.py --config.compare.methods=lora_r8,bitfit,full
    ./run.sh experiments/compare_methods.py --config.compare.seeds=0,1,2 --config.train.steps=300
    ./run.sh experiments/glue_lora.py --config=configs/compare_methods.py:lora_r8

`METHODS` is what is compared; the last line runs one of them by itself. Other data, another model
or budget are keys of the command line as anywhere; what a method is and its rate stand here alone.

    compare.methods               names in METHODS
    compare.seeds                 of initialisation, data order and dropout
    compare.validation_examples   so many, from all over it, for choosing rates; none: all
    compare.test_examples         so many, from all over it, for the table; none: all

On two CPU cores that had other work to do, 25 methods took 1 h 12 min 40 s; the best were full
(0.711 test accuracy), the last layer alone (0.677) and parallel adapters (0.653). The table is in
README.

The rates are usual ones for a model of this size and so few steps; none was searched for, so a
place in the table says as much about its rate as about a method. 1,200 tweets leave a standard
error of 0.013 to each accuracy, but all methods are measured on the same.
"""

from configs import base

# name: (peft.methods, the group of each method where it is not the default, learning rate)
METHODS = {
    "full": (("full",), {}, 2e-4),
    "linear_probe": (("linear_probe",), {}, 2e-2),
    "partial_last": (("partial_tuning",), {"partial_tuning": {"last": 1}}, 5e-4),
    "norm_tuning": (("norm_tuning",), {}, 4e-3),
    "bitfit": (("bitfit",), {}, 4e-3),
    # the LoRA family, on query and value if nothing else is said
    "lora_r8": (("lora",), {"lora": {"rank": 8, "alpha": 16.0}}, 2e-3),
    "lora_plus": (("lora_plus",), {"lora_plus": {"rank": 8, "alpha": 16.0, "ratio": 16.0}}, 5e-4),
    "dora": (("dora",), {"dora": {"rank": 8, "alpha": 16.0}}, 2e-3),
    "pissa": (("pissa",), {"pissa": {"rank": 8, "alpha": 8.0}}, 1e-3),
    "adalora": (("adalora",), {"adalora": {"target_rank": 8, "init_rank": 12}}, 4e-3),
    "vera": (("vera",), {"vera": {"rank": 256}}, 1e-2),
    "loha": (("loha",), {"loha": {"rank": 8, "alpha": 16.0}}, 4e-3),
    "lokr": (("lokr",), {"lokr": {"rank": 8, "alpha": 16.0}}, 4e-3),
    "fourierft": (
        ("fourierft",),
        {"fourierft": {"learning_rate": 5e-2}},
        6e-3,
    ),
    # rotations
    "oft": (("oft",), {"oft": {"block_size": 32}}, 2e-3),
    "boft": (("boft",), {"boft": {"block_size": 4}}, 2e-3),
    # factors and bottlenecks
    "ia3": (("ia3",), {}, 1e-2),
    "houlsby": (("adapter",), {"adapter": {"kind": "houlsby"}}, 1.5e-3),
    "pfeiffer": (("adapter",), {"adapter": {"kind": "pfeiffer"}}, 1.5e-3),
    "parallel": (("adapter",), {"adapter": {"kind": "parallel", "reduction": 8}}, 1e-3),
    "compacter": (("compacter",), {}, 4e-3),
    # virtual tokens
    "prefix_tuning": (("prefix_tuning",), {}, 1e-2),
    "prompt_tuning": (("prompt_tuning",), {}, 3e-2),
    "p_tuning": (("p_tuning",), {}, 2e-3),
    # the thousand most frequent words of BERT's vocabulary, which has them by frequency from "the"
    "token_rows": (("token_rows",), {"token_rows": {"tokens": tuple(range(1996, 2996))}}, 5e-3),
}
VARIANTS = tuple(METHODS)


def get_config(variant=None):
    """`variant`: a name in METHODS, for a run of that method alone; None: the comparison."""
    config = base.get_config()
    config.data.name = "tweets"
    config.data.max_length = 64
    config.train.steps = 64
    if variant is not None:
        methods, groups, rate = METHODS[variant]
        config.peft.methods = methods
        config.peft.update(groups)
        config.optim.learning_rate = rate
        return config
    config.compare = {
        "methods": tuple(METHODS),
        "seeds": (0, 1),
        "validation_examples": 250,
        "test_examples": 1200,
    }
    config.log.every = 50
    config.log.tensorboard = False
    config.eval.every = 1_000_000  # at the end alone: the last step is what is compared
    config.export.adapter = False
    return config
