"""LoRA on an 8 to 70 billion parameter model in 4 bits, on a pod: QLoRA's settings.

    ./run.sh experiments/instruct_lora.py --config=configs/large_lora.py:llama3_8b \\
        --config.data.train=train.jsonl --config.data.validation=dev.jsonl
    ./run.sh experiments/instruct_lora.py --config=configs/large_lora.py:llama3_70b ...
    ./run.sh experiments/instruct_lora.py --config=configs/large_lora.py:qwen3_8b ...

The files hold chats: `messages`, or as ShareGPT and Alpaca have them. The base lies in NF4 with
double quantization, split over all devices (mesh.fsdp), the rest of it in bfloat16; each block is
computed again in the backward pass. Settings are those of the Guanaco models (Dettmers et al. 2023,
arXiv:2305.14314, and its repository's scripts/finetune_llama2_guanaco_7b.sh and _guanaco_65b.sh):
rank 64, alpha 16 on all dense layers, batch 16, 1,875 steps at a constant 2e-4 (70B: 1e-4), no
decay, gradients clipped at 0.3. There is no score that this could be held against: its data were
OpenAssistant's, and its bases older.

tests/test_large_configs.py counts, from shapes alone, what a device holds of the base: 0.71 GB of
Llama's 8B and 0.76 GB of Qwen's on 8 devices, 2.49 GB of 70B on 16. The adapter lies whole on each,
with its gradient and AdamW's moments 16 bytes a number: 2.7 GB, and 13.3 GB at 70B, where a smaller
rank is the first thing to change. None has been run by us: no accelerator was at hand. The Hub
wants its licence accepted before it gives Llama's weights.
"""

from configs import base

# variant: (model, learning rate, dropout)
MODELS = {
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B-Instruct", 2e-4, 0.1),
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B-Instruct", 1e-4, 0.05),
    "qwen3_8b": ("Qwen/Qwen3-8B", 2e-4, 0.1),
}


def get_config(variant="llama3_8b"):
    """`variant`: llama3_8b, llama3_70b, qwen3_8b."""
    if variant not in MODELS:
        raise ValueError(f"no variant {variant!r}; known: {', '.join(MODELS)}")
    config = base.get_config()
    config.model.name, config.optim.learning_rate, dropout = MODELS[variant]
    config.model.quantize = "nf4"
    config.model.remat = "block"
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.peft.methods = ("lora",)
    config.peft.lora = {"rank": 64, "alpha": 16.0, "dropout": dropout, "targets": ("all-linear",)}
    config.task.name = "causal_lm"
    config.data.name = "files"
    config.data.max_length = 528  # there 16 of the question and 512 of the answer
    config.train.steps = 1875
    config.train.batch_size = 16
    config.optim.schedule = "constant"
    config.optim.warmup = 0.0
    config.optim.weight_decay = 0.0
    config.optim.clip = 0.3
    config.eval.every = 187
    config.generate = {"prompts": 8, "tokens": 256}
    return config
