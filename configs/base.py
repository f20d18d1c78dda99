"""Every common key, its default and its meaning.

A config file starts from `get_config()` here and changes what it needs. A key that may be left
open (`None`) is a `placeholder` of its type. Method, model and task groups take the arguments of
their `make` as well; `./run.sh experiments/NAME.py --help` prints all of them for a config.
"""

from ml_collections.config_dict import ConfigDict, placeholder


def get_config():
    config = ConfigDict()
    config.seed = 0  # one key for initialisation, data order, dropout

    config.model = model = ConfigDict()
    model.name = "minilm"  # minilm, smollm2, ..., a Hugging Face directory, a file, or a Hub id
    model.dtype = placeholder(str)  # compute dtype; None: bfloat16 on TPU and GPU, float32 on CPU
    model.storage = placeholder(str)  # dtype of frozen leaves in memory; None: the compute dtype
    # What the backward pass computes again: none; block: all that is in a block; dots_saveable: all
    # but matrix products; dots_with_no_batch_dims_saveable: all but those with weights.
    model.remat = "none"
    model.quantize = placeholder(str)  # nf4, int8, int4: how frozen dense kernels of the stack lie
    model.unroll = 1  # layers per iteration of the scan over layers; changes speed only

    config.peft = peft = ConfigDict()
    peft.methods = ("lora",)  # any of bmft/peft/; each has a group of its own, peft.<method>
    # Every method's group also takes learning_rate and weight_decay (None: those of optim).

    config.task = task = ConfigDict()
    task.name = "text_classification"  # a file of bmft/tasks/; further keys are its make's

    config.data = data = ConfigDict()
    data.name = "tweets"  # tweets, instruct, files, digits, npz, folders, glue/*, tfds:*, hub:*
    data.dir = placeholder(str)  # where TFDS, a copy of a Hub data set, or folders of images lie
    data.train = placeholder(str)  # CSV, TSV, JSON(L), Parquet by ending; of images .npz, a folder
    data.validation = placeholder(str)
    data.test = placeholder(str)
    data.text = "text"  # column of the (first) text
    data.text_pair = placeholder(str)  # column of the second text, if any
    data.label = "label"  # column of the label
    data.max_length = 128  # tokens an example is cut to
    data.row_length = placeholder(int)  # tokens a packed row; None: by platform and data
    data.max_train_examples = placeholder(int)  # the first so many, for learning curves
    data.cache = placeholder(str)  # of tokens, features; None: $BMFT_CACHE or ~/.cache/bmft

    config.train = train = ConfigDict()
    train.steps = placeholder(int)  # either steps ...
    train.epochs = placeholder(float)  # ... or epochs
    train.batch_size = 32  # examples a step, over all hosts and devices
    train.accumulate = 1  # parts a batch is computed in; the result is that of one large batch
    train.early_stopping = 0  # evaluations without a better eval.metric before stopping; 0: never

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # adamw, sgd, adafactor, lion
    optim.learning_rate = 5e-4  # peak
    optim.head_learning_rate = placeholder(float)  # of the task's head; None: learning_rate
    optim.schedule = "linear"  # linear, cosine (both to zero), constant
    optim.warmup = 0.06  # share of the steps with a rising rate
    optim.weight_decay = 0.01  # never on biases and norms
    optim.clip = 1.0  # global norm of the gradient; 0: no clipping
    optim.beta1 = 0.9  # adamw, lion; momentum of sgd
    optim.beta2 = 0.999  # adamw, lion
    optim.eps = 1e-8  # adamw

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices along each axis; one may be -1: the rest
    mesh.fsdp = 1
    mesh.tensor = 1

    config.eval = evaluation = ConfigDict()
    evaluation.every = placeholder(int)  # steps; None: five times a run
    evaluation.metric = placeholder(str)  # names the best checkpoint; None: the task's own
    evaluation.batch_size = 64  # examples

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = placeholder(int)  # steps; None: whenever eval.every
    checkpoint.keep = 2  # newest complete checkpoints kept, beside the best
    checkpoint.folder = placeholder(str)  # or gs://bucket/path: of checkpoints/; None: --workdir

    config.log = log = ConfigDict()
    log.every = 10  # steps a row of metrics.jsonl averages over
    log.tensorboard = True
    log.wandb = False  # needs the package wandb
    log.progress = True  # the bar; lines instead where the output is no terminal

    config.export = export = ConfigDict()
    export.adapter = True
    export.merged = False  # also write model/: the method folded into plain weights
    export.best = True  # of the best checkpoint by eval.metric; False: of the last step

    return config
