"""LoRA on a small instruction-tuned model: it learns a house style for its answers.

    ./run.sh experiments/instruct_lora.py                        instruct, smollm2, CPU
    ./run.sh experiments/instruct_lora.py --config.data.name=files --config.data.train=mine.jsonl
    ./run.sh experiments/instruct_lora.py --config.model.quantize=nf4

`instruct` needs nothing but the package registry: SmolLM2-135M-Instruct, as a package carries it
(4 bits, which are read as float32), and 120 questions of this repository, each answered in three
lines, `In short`, `Why`, `Try` (bmft/data/instruct.jsonl). Fifteen of them are kept for validation:
that the lines come back after questions that were not trained on is what there is to see. What the
answers say is no more reliable than before.

On two CPU cores: 6 min 27 s, 3.4 GB. Perplexity of the held-out answers 54.65 before and 8.84 after
40 steps; in the end all eight questions that are asked are answered in the three lines.

Chats in your own file: JSON lines with `messages`, or as ShareGPT, Alpaca and others have them
(bmft/data/dialog_formats.py).
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
    config.task.name = "causal_lm"
    config.data.name = "instruct"
    config.data.max_length = 192
    config.train.steps = 40
    config.train.batch_size = 8
    config.optim.learning_rate = 1e-3
    config.eval.every = 20
    config.eval.batch_size = 16
    return config
