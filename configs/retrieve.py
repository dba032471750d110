"""Image-text retrieval with trained weights: zero-shot, or fine-tuned with the UniCL loss.

    python -m florence_jax.main --config=configs/retrieve.py:protocol=zeroshot --config.init=DIR \
        --config.eval.source=karpathy:dataset_flickr30k.json:test@flickr30k-images
    python -m florence_jax.main --config=configs/retrieve.py:protocol=finetune --config.init=DIR \
        --config.data.train=karpathy:dataset_coco.json:train+restval@coco \
        --config.eval.source=karpathy:dataset_coco.json:test@coco

Sources are Karpathy's split files (five captions an image are used), or any other, of which all captions are: a folder
with captions.csv, or one sub-folder of images for each class, whose names are then the texts. Results: R@1, R@5, R@10
both ways, in WORKDIR/result.json and report.html.

Arguments: protocol = zeroshot | finetune; res = image size (0: the weights' own); runlocal. Fine-tuning is the
pretraining task with the paper's settings (batch 3,072, 12 epochs, cosine, 200 warm-up steps, peak 2e-5; resolution not
stated); a smaller data set gets a batch of at most its own size. Flickr30k and COCO were not run by this project.
"""

from ml_collections import ConfigDict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.train.defaults import common, model_overrides


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'protocol=finetune,res=384'."""
    given = parse_arg(arg, protocol="zeroshot", res=0, runlocal=False)
    if given.protocol not in ("zeroshot", "finetune"):
        raise UserError(f"unknown protocol {given.protocol!r}; known: zeroshot, finetune")
    trains = given.protocol == "finetune"
    config = common(f"runs/retrieve_{given.protocol}")
    config.task, config.protocol = "retrieve", given.protocol
    config.mode = "train" if trains else "eval"
    config.init = "runs/pretrain/checkpoints"
    config.model = {"variant": "", "overrides": model_overrides()}  # as config.init says
    if given.res:
        config.model.overrides.res = given.res
    config.data.train = "emoji:train" if trains else ""  # pairs
    config.data.eval_ops = ""  # '': as the publishers of the weights do, else shorter side and a crop of the middle
    config.data.captions = ""  # fields and weights; '': "captions=1" where records have that list, else "caption=1"
    config.text = {
        "tokenizer": "",  # '': the one that the weights were trained with
        "templates": False,
        "subword_sampling": 0.0,
        "extra_captions": "",  # see configs/pretrain.py
    }
    config.loss = "unicl"
    config.grad_cache = {"micro_batch": 0, "towers": "both"}  # see configs/pretrain.py
    config.eval.every = -1  # each epoch
    config.eval.source = "emoji:new_names"
    config.batch_size = 3072
    config.epochs, config.total_steps = 12, 0  # total_steps > 0 overrides epochs
    config.optim.learning_rate = 2e-5
    config.optim.warmup_steps = 200  # at most a tenth of the steps
    if given.runlocal:
        config.batch_size, config.data.workers, config.eval.batch_size = 16, 0, 32
        config.total_steps, config.log.every = 2, 1
        config.workdir += "_runlocal"
    return config
