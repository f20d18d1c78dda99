"""LoRA on a text classifier: `tweets` (the default), and a variant per GLUE task.

    ./run.sh experiments/glue_lora.py                                        tweets, minilm, CPU
    ./run.sh experiments/glue_lora.py --config=configs/glue_lora.py:sst2     GLUE, roberta-base

`tweets` needs nothing but the package registry: 37,243 labelled tweets and a 6-layer MiniLM.
On two CPU cores: 4 minutes, 1.5 GB; test accuracy 0.72 after 200 steps, 0.75 after 300
(`--config.train.steps=300`), where the largest class is 43 %.

The GLUE variants are the LoRA paper's on RoBERTa-base (Hu et al. 2021, arXiv:2106.09685, Table 2,
and its repository's scripts examples/NLU/roberta_base_*.sh, whose batch is per device, on eight):
rank 8, alpha 16 on query and value, AdamW with decay 0.1, linear schedule after 6 % of warm-up, cut
at 512 tokens. Published dev scores (median of five seeds, best epoch): MNLI 87.5, SST-2 95.1, MRPC
89.7, CoLA 63.4, QNLI 93.3, QQP 90.8, RTE 86.6, STS-B 91.5; those of MRPC, RTE and STS-B start from
an adapter trained on MNLI, which these variants do not do: expect about 89, 77 to 80 and 91. WNLI
has no published LoRA result; its variant takes RTE's settings. They want an accelerator (hours on
one chip), and GLUE from TFDS (`data.dir`). They have not been run by us: neither accelerator nor
RoBERTa was at hand.
"""

from configs import base

# task: (examples a device in the paper's scripts, learning rate, epochs)
GLUE = {
    "cola": (32, 4e-4, 80),
    "mnli": (16, 5e-4, 30),
    "mrpc": (16, 4e-4, 30),
    "qnli": (32, 4e-4, 25),
    "qqp": (16, 5e-4, 25),
    "rte": (32, 5e-4, 80),
    "sst2": (16, 5e-4, 60),
    "stsb": (16, 4e-4, 40),
    "wnli": (32, 5e-4, 80),
}


def get_config(variant="tweets"):
    """`variant`: tweets, or a GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli."""
    config = base.get_config()
    config.peft.methods = ("lora",)
    if variant == "tweets":
        config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("query", "value")}
        config.data.name = "tweets"
        config.data.max_length = 64
        config.train.steps = 200
        config.optim.learning_rate = 2e-3
        config.eval.every = 100
        return config
    if variant not in GLUE:
        raise ValueError(f"no variant {variant!r}; known: tweets, {', '.join(GLUE)}")
    config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("query", "value")}
    config.model.name = "roberta-base"
    config.data.name = f"glue/{variant}"
    config.data.max_length = 512
    config.train.batch_size, config.optim.learning_rate, config.train.epochs = GLUE[variant]
    config.optim.weight_decay = 0.1
    return config
