"""LoRA on slices of TPUs, each variant for one of them: what is planned before it is rented.

    ./run.sh -m bmft.plan --config=configs/tpu_slices.py:llama3_8b --topology=v5e:4x4
    ./run.sh experiments/instruct_lora.py --config=configs/tpu_slices.py:llama3_8b \\
        --config.data.train=train.jsonl --config.data.validation=dev.jsonl

variant              slice     experiment             what it is
llama3_8b            v5e:4x4   instruct_lora          Llama 3 8B, base in bfloat16, rank 16
llama3_70b           v6e:8x8   instruct_lora          Llama 3 70B, the same
llama3_70b_v5e       v5e:8x16  instruct_lora          the same on twice as many, smaller chips
vit_large            v5e:2x4   image_classification   ViT-L/16 on CIFAR-10 at 224 pixels
roberta_large_TASK   v5e:2x4   glue_lora              RoBERTa-large, a task of GLUE

`./run.sh benchmarks/plans.py` writes what each needs, by its plan, into benchmarks/plans/; that of
llama3_70b_v5e is not there yet. None has been run by us: no accelerator was at hand.

Llama's settings: the learning rates of configs/large_lora.py, chats of at most 1,024 tokens; there
is no score that they could be held against. RoBERTa-large: the LoRA paper's (Hu et al. 2021,
arXiv:2106.09685, Table 9): rank 8, alpha 16 on query and value, AdamW, linear after 6 % of warm-up,
batches of 4, of RTE and STS-B 8, on each of eight chips. Its dev scores (Table 2): MNLI 90.6, SST-2
96.2, MRPC 90.9, CoLA 68.2, QNLI 94.9, QQP 91.6, RTE 87.4, STS-B 92.6; those of MRPC, RTE and STS-B
start from MNLI's adapter, which these variants do not. ViT-L: the settings of
configs/cifar_vit.py:lora; no published score.
"""

from configs import base

# task: (examples a chip, learning rate, epochs, tokens)
GLUE = {
    "mnli": (4, 3e-4, 10, 128),
    "sst2": (4, 4e-4, 10, 128),
    "mrpc": (4, 3e-4, 20, 512),
    "cola": (4, 2e-4, 20, 128),
    "qnli": (4, 2e-4, 10, 512),
    "qqp": (4, 3e-4, 20, 512),
    "rte": (8, 4e-4, 20, 512),
    "stsb": (8, 2e-4, 30, 512),
}
# variant: (model, learning rate, fsdp, tensor)
LLAMA = {
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B-Instruct", 2e-4, 16, 1),
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B-Instruct", 1e-4, 32, 2),
    "llama3_70b_v5e": ("meta-llama/Meta-Llama-3-70B-Instruct", 1e-4, 32, 4),
}
VARIANTS = (*LLAMA, "vit_large", *(f"roberta_large_{task}" for task in GLUE))


def get_config(variant="llama3_8b"):
    """`variant`: llama3_8b, llama3_70b, llama3_70b_v5e, vit_large, or roberta_large_ and a task of
    GLUE: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb."""
    config = base.get_config()
    config.peft.methods = ("lora",)
    if variant in LLAMA:
        return _llama(config, *LLAMA[variant])
    if variant == "vit_large":
        return _vit(config)
    return _roberta(config, variant.removeprefix("roberta_large_"))


def _llama(config, name, rate, fsdp, tensor):
    config.model.name, config.model.remat = name, "block"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, fsdp, tensor
    config.peft.lora = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": ("all-linear",)}
    config.task.name = "causal_lm"
    config.data.name = "files"
    config.data.max_length = 1024
    config.train.epochs = 1.0
    config.train.batch_size = 64
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup = rate, "cosine", 0.03
    config.optim.weight_decay = 0.0
    config.optim.clip = 0.3
    config.generate = {"prompts": 8, "tokens": 256}
    return config


def _vit(config):
    config.model.name = "google/vit-large-patch16-224-in21k"
    config.peft.lora = {"rank": 16, "alpha": 16.0, "targets": ("query", "value")}
    config.task.name = "image_classification"
    config.task.flip = True
    config.data.name = "tfds:cifar10"
    config.data.validation_share = 0.02
    config.train.steps = 1000
    config.train.batch_size = 128
    config.optim.learning_rate, config.optim.schedule = 5e-3, "cosine"
    return config


def _roberta(config, task):
    each, config.optim.learning_rate, config.train.epochs, tokens = GLUE[task]
    config.model.name = "roberta-large"
    config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("query", "value")}
    config.data.name, config.data.max_length = f"glue/{task}", tokens
    config.train.batch_size = 8 * each
    config.optim.weight_decay = 0.1
    return config
