"""CIFAR-10 with a Vision Transformer.

    ./run.sh experiments/image_classification.py --config=configs/cifar_vit.py:lora
    ./run.sh experiments/image_classification.py --config=configs/cifar_vit.py:full

google/vit-base-patch16-224-in21k from the Hub on CIFAR-10 from TFDS, at 224 pixels.

`full`: the settings of Dosovitskiy et al. 2021 (arXiv:2010.11929, Table 4): SGD with momentum 0.9,
batch 512, cosine from 0.01 after 500 steps of warm-up, no decay, gradients clipped at norm 1; its
repository (google-research/vision_transformer) reports 98.86 % after 1,000 steps at 224 pixels.
`lora`: query and value, rank 16, alpha 16, as peft's own image example; no published score.
`prompts`: visual prompt tuning, deep (Jia et al. 2022, arXiv:2203.12119), 50 tokens; the paper has
no score on CIFAR-10.

They want an accelerator: minutes on one of a kind with 16 GB. They were not run by us: no network,
no accelerator.
"""

from configs import base

VARIANTS = ("lora", "full", "prompts")


def get_config(variant="lora"):
    """`variant`: lora, full, prompts."""
    config = base.get_config()
    config.task.name = "image_classification"
    config.task.flip = True
    config.model.name = "google/vit-base-patch16-224-in21k"
    config.data.name = "tfds:cifar10"
    config.data.validation_share = 0.02
    config.train.steps = 1000
    config.train.batch_size = 512
    config.optim.schedule = "cosine"
    config.optim.clip = 1.0
    if variant == "full":
        config.peft.methods = ("full",)
        config.optim.name = "sgd"
        config.optim.learning_rate = 0.01
        config.optim.warmup = 0.5
        config.optim.weight_decay = 0.0
    elif variant == "prompts":
        config.peft.methods = ("visual_prompt",)
        config.peft.visual_prompt = {"tokens": 50}
        config.optim.learning_rate = 5e-3
    else:
        config.peft.methods = ("lora",)
        config.peft.lora = {"rank": 16, "alpha": 16.0, "targets": ("query", "value")}
        config.train.batch_size = 128
        config.optim.learning_rate = 5e-3
    return config
