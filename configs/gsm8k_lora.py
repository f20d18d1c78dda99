"""LoRA on a language model for GSM8K (Cobbe et al. 2021, arXiv:2110.14168): school mathematics.

    ./run.sh experiments/instruct_lora.py --config=configs/gsm8k_lora.py \\
        --config.data.train=DIR/train.jsonl --config.data.test=DIR/test.jsonl
    ./run.sh experiments/instruct_lora.py --config=configs/gsm8k_lora.py:full ... \\
        --config.model.name=MODEL

DIR is grade_school_math/data of github.com/openai/grade-school-math. The model learns the worked
answers without the calculator's marks; then it answers the first `generate.prompts` questions of
the test split, greedily, and the number behind `####` counts (exact_match, before and after).

`smollm2` is for two CPU cores: 240 problems, 30 answers, perplexity on 100 problems: 3.94 before
and 2.93 after, 2 and 0 of 30 answers right (it learns the form; 135 million parameters do not
compute); 5.4 GB, at most 20 minutes (other work went on). `full`: all problems three times, all
1,319 answers, for an accelerator; not run by us. Every rate is a guess.
"""

from configs import base


def get_config(variant="smollm2"):
    """`variant`: smollm2, full."""
    if variant not in ("smollm2", "full"):
        raise ValueError(f"no variant {variant!r}; known: smollm2, full")
    config = base.get_config()
    config.model.name = "smollm2"
    config.peft.methods = ("lora",)
    config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("all-linear",)}
    config.task.name = "causal_lm"
    config.data.name = "files"
    config.data.format = "gsm8k"
    config.data.max_length = 512
    config.train.batch_size = 8
    config.optim.learning_rate = 1e-3
    config.generate = {"prompts": 50, "tokens": 256}
    config.eval.batch_size = 10
    config.eval.every = 100
    if variant == "smollm2":
        config.train.steps = 30
        config.eval.every = 30
        config.data.max_eval_examples = 100
        config.generate = {"prompts": 30, "tokens": 200}
        return config
    config.train.epochs = 3.0
    config.train.batch_size = 32
    config.optim.learning_rate = 2e-4
    config.model.remat = "block"
    config.generate.prompts = None
    config.eval.batch_size = 64
    return config
