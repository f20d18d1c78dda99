"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) of LoRA on smollm2.

    ./run.sh experiments/instruct_lora.py --config=configs/dpo.py
    ./run.sh experiments/instruct_lora.py --config=configs/dpo.py --config.task.method=simpo
    ./run.sh experiments/instruct_lora.py --config=configs/dpo.py --config.data.name=files \\
        --config.data.train=mine.jsonl          (prompt, chosen, rejected; or lists of messages)

The 120 questions of configs/instruct_lora.py as pairs: the answer in three lines is preferred to
the same words in one. The reference is the base without its adapter, so no second model is held.
What there is to see: accuracy and margin on the 15 pairs that were not trained on, 0 before the
first step; and whether the lines come by themselves.

On two CPU cores that had other work to do: 12 min 23 s, 4.8 GB. Accuracy 1 and margin 6.8 after 13
steps, the first of equal accuracy and so what is kept (8.4 after 26). The pairs are told apart, as
the answers in one line became much less likely; only one of eight answers came in lines by itself.
"""

from configs import base


def get_config(variant="instruct"):
    """`variant`: instruct."""
    if variant != "instruct":
        raise ValueError(f"no variant {variant!r}; known: instruct")
    config = base.get_config()
    config.model.name = "smollm2"
    config.peft.methods = ("lora",)
    config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("all-linear",)}
    config.task.name = "preference"
    config.task.method = "dpo"
    config.task.beta = 0.1
    config.data.name = "instruct"
    config.data.max_length = 192
    config.train.steps = 26
    config.train.batch_size = 8
    config.optim.learning_rate = 5e-4
    config.eval.every = 13
    config.eval.batch_size = 8
    return config
