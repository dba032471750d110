"""Image-text retrieval with trained weights: zero-shot, or fine-tuned with the UniCL loss.

    python -m florence_jax.main --config=configs/retrieve.py:mode=zeroshot --config.init=DIR \
        --config.eval.source=karpathy:dataset_flickr30k.json:test@flickr30k-images
    python -m florence_jax.main --config=configs/retrieve.py:mode=finetune --config.init=DIR \
        --config.data.train=karpathy:dataset_coco.json:train+restval@coco \
        --config.eval.source=karpathy:dataset_coco.json:test@coco

Sources are Karpathy's split files (five captions an image are used), or any other: a folder with captions.csv, or one
sub-folder of images for each class, whose names are then the texts. Results: R@1, R@5, R@10 both ways, in
WORKDIR/result.json and report.html.

Arguments: mode = zeroshot | finetune; res = image size (0: the weights' own); runlocal. Fine-tuning is the pretraining
task with the paper's settings (batch 3,072, 12 epochs, cosine, 200 warm-up steps, peak 2e-5; resolution not stated);
a smaller data set gets a batch of at most its own size. Flickr30k and COCO were not run by this project.
"""

from ml_collections import ConfigDict

from configs.common import common, model_overrides, parse_arg
from florence_jax.errors import UserError


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'mode=finetune,res=384'."""
    given = parse_arg(arg, mode="zeroshot", res=0, runlocal=False)
    if given.mode not in ("zeroshot", "finetune"):
        raise UserError(f"unknown mode {given.mode!r}; known: zeroshot, finetune")
    trains = given.mode == "finetune"
    config = common(f"runs/retrieve_{given.mode}")
    config.task = "retrieve"
    config.mode = "train" if trains else "eval"
    config.init = "runs/pretrain/checkpoints"
    config.model = {"variant": "", "overrides": model_overrides()}  # as config.init says
    if given.res:
        config.model.overrides.res = given.res
    config.data = {
        "train": "emoji:train",
        "train_image_ops": "decode|rrc({res}, scale=(0.5, 1.0))",
        "eval_image_ops": "decode|resize({res})|center_crop({res})",
        "captions": "",  # fields and weights; '': "captions=1" where records have that list, else "caption=1"
        "workers": 8 if trains else 0,
        "cache": False,
        "on_corrupt": "skip",
    }
    config.text = {
        "tokenizer": "",  # '': the one that the weights were trained with
        "templates": False,
        "subword_sampling": 0.0,
    }
    config.loss = "unicl"
    config.grad_cache = {"micro_batch": 0, "towers": "both"}  # see configs/pretrain.py
    config.eval = {"every": -1, "batch_size": 256, "source": "emoji:new_names"}  # every: steps; -1: each epoch
    config.batch_size = 3072
    config.epochs, config.total_steps = 12, 0  # total_steps > 0 overrides epochs
    config.optim.learning_rate = 2e-5
    config.optim.warmup_steps = 200  # at most a tenth of the steps
    if not trains:
        config.total_steps = 1
        config.optim.warmup_steps = 0
    if given.runlocal:
        config.batch_size, config.data.workers, config.eval.batch_size, config.log.every = 16, 0, 32, 1
        config.epochs, config.total_steps = 1, 2 if trains else 1
    return config
