"""Classification with trained weights: the paper's protocols, or the same on your own folder of images.

    python -m florence_jax.main --config=configs/classify.py:protocol=zeroshot --config.init=DIR \
        --config.data.test=DIR_OR_TFDS [--config.classes=names.txt]                  # zero-shot, prompt ensembles
    python -m florence_jax.main --config=configs/classify.py:protocol=probe --config.init=DIR --config.data.train=DIR
    python -m florence_jax.main --config=configs/classify.py:protocol=fewshot --config.init=DIR \
        --config.data.test=eurosat:DIR
    python -m florence_jax.main --config=configs/classify.py:protocol=finetune_unicl,res=512 --config.init=DIR \
        --config.data.train=tfds:imagenet2012:train --config.data.test=tfds:imagenet2012:validation
    python -m florence_jax.main --config=configs/classify.py:protocol=finetune_linear --config.init=DIR \
        --config.data.train=DIR
    python -m florence_jax.main --config=configs/classify.py:protocol=head --config.init=DIR \
        --config.data.test=DIR                                                       # what finetune_linear trained

`--config.init` is `checkpoints/` of a run (the default is that of configs/pretrain.py) or a folder written by
florence_jax.tools.import_torch. Data: a folder with one sub-folder of images for each class, ArrayRecord files, or
tfds:NAME:SPLIT. Results are in WORKDIR/result.json and report.html.

Further names of data: isic:DIR, eurosat:DIR, cropdisease:DIR, chestx:DIR (as their publishers pack them), digits:train.

Arguments: protocol = zeroshot | probe | fewshot | head | finetune_unicl | finetune_linear; res = image size (0: the
weights' own); runlocal. probe: logistic regression on frozen features, CLIP's protocol. fewshot: 600 episodes of CD-FSL
on the head; --config.fewshot.train=backbone trains the image tower too, as in the paper.
Fine-tuning has the paper's ImageNet recipe (UniCL loss on class prompts, no new head, batch 8,192, 10 epochs, cosine,
500 warm-up steps, peak 2e-5) for sets of 100,000 images and more. Smaller ones get batch, epochs and learning rate by
their size, and the epoch is kept that is best on held-out images. It was run at size ti only.

A preflight of fine-tuning (florence_jax.tools.aot_compile) needs neither weights nor data:
--config.init= --config.model.variant=NAME --config.data.train= --config.total_steps=1560
(and, with a head, --config.classes=imagenet2012 for its size).
"""

from ml_collections import ConfigDict, config_dict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.train.defaults import common, model_overrides

EVALUATED = ("zeroshot", "probe", "fewshot", "head")
TRAINED = ("finetune_unicl", "finetune_linear")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'protocol=finetune_unicl,res=512'."""
    given = parse_arg(arg, protocol="zeroshot", res=0, runlocal=False)
    if given.protocol not in (*EVALUATED, *TRAINED):
        raise UserError(f"unknown protocol {given.protocol!r}; known: {', '.join((*EVALUATED, *TRAINED))}")
    trains = given.protocol in TRAINED
    config = common(f"runs/classify_{given.protocol}")
    config.task, config.protocol = "classify", given.protocol
    config.mode = "train" if trains else "eval"
    config.init = "runs/pretrain/checkpoints"
    config.model = {"variant": "", "overrides": model_overrides()}  # as config.init says
    if given.res:
        config.model.overrides.res = given.res
    learns = trains or given.protocol == "probe"
    config.data.train = "emoji:train" if learns else ""  # images with their classes
    config.data.test = "" if learns else "emoji:new_style"  # held-out images; '': `holdout` of each class of data.train
    config.data.train_ops = ""  # '': crops; mirrored too from 100,000 images on
    config.data.eval_ops = ""  # '': as the publishers of the weights do, else shorter side and crop (KITTI: squashed)
    config.holdout = 0.2  # share of each class that is kept for testing or choosing, where no such images are named
    config.validation = ""  # images to choose the probe's C and the epoch on; '': `holdout` of each class of data.train
    config.classes = ""  # a file of class names, or a shipped set such as food101; '': the data's own labels
    config.label_field = ""  # record field with the class; '': class_id, labels or caption
    config.templates = ""  # a set's name or a file; '': the set's own, else those of the weights, else CLIP's
    config.metric = ""  # top1 | mean_per_class | voc_map | roc_auc; '': the data set's own
    config.text = {"tokenizer": ""}  # '': the one that the weights were trained with
    config.eval.every = -1  # each epoch
    # None, here and below: from 100,000 images on the paper's recipe, below by their number (docs/classification.md)
    config.batch_size = config_dict.placeholder(int)  # at most the number of images
    config.epochs = config_dict.placeholder(int)
    config.total_steps = 0  # above 0 it overrides epochs
    config.keep = ""  # 'best': of the epoch that is best on held-out images; 'last'; '': best below 100,000 images
    # finetune_linear: 'probe', of a linear probe, or 'zeros', on the features; 'text': class embeddings, after the
    # projection; '': probe below 100,000 images
    config.head_init = ""
    config.label_smoothing = 0.0  # finetune_linear: share of the target that is spread over all classes
    config.wise_ft = ()  # also evaluate (1 - a) initial + a fine-tuned weights for each a, e.g. (0.5,)
    config.forgetting = {  # fine-tuning
        "source": "",  # a set whose zero-shot accuracy is watched, such as emoji:new_names; '': none
        "classes": "",  # its class names; '': its own
        "threshold": 0.05,  # a larger fall is warned of
    }
    config.probe = {"sklearn": False}  # True: also fit scikit-learn's LogisticRegression at the chosen C, to compare
    config.fewshot = {
        "train": "head",  # or 'backbone': the image tower too
        "ways": 5,  # classes of an episode
        "shots": (5, 20, 50),  # images of each that are learned from: a row of results each
        "queries": 15,  # images of each that are asked about
        "episodes": 600,
        "lanes": 0,  # episodes trained at once, under vmap; 0: 64 heads, or as many backbones as fit
    }
    config.optim.learning_rate = config_dict.placeholder(float)
    config.optim.warmup_steps = config_dict.placeholder(int)  # at most a tenth of the steps
    config.optim.layer_decay = 1.0  # learning rate of each layer over that of the one above it
    if given.runlocal:
        config.batch_size, config.data.workers, config.eval.batch_size = 16, 0, 32
        config.total_steps, config.log.every = 2, 1
        config.fewshot.shots, config.fewshot.episodes = (5,), 8
        config.workdir += "_runlocal"
    return config
