"""Pretraining of a fusion of image and text: image-text matching and masked words, on the towers of `config.init`.

    python -m florence_jax.main --config=configs/vlp.py                       # on scenes, from runs/pretrain (laptop)
    python -m florence_jax.main --config=configs/vlp.py --config.data.train=my_pairs --config.init=DIR
    python -m florence_jax.main --config=configs/vlp.py:recipe=paper --config.init=DIR \
        --config.data.train='coco_captions:captions_train2017.json:train2017|cc3m'

Data: images with captions, as of configs/pretrain.py, and those of docs/vision_language.md; several joined by '|', each
with an optional '*weight'. `--config.init` is the workdir of a run (the default is that of configs/pretrain.py) or a
folder written by florence_jax.tools.import_torch. Results are in WORKDIR/result.json and report.html.

Arguments: recipe = paper (43 epochs at 384 pixels; what it leaves open is METER's; never run here); variant = size of
the towers, for a preflight without weights; res = side of the picture in pixels; runlocal.

A preflight (florence_jax.tools.aot_compile) needs neither weights nor data: --config.init= and variant=NAME.
"""

from ml_collections import ConfigDict, config_dict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.train.defaults import common, fusion_overrides, model_overrides

RECIPES = ("", "paper")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'recipe=paper,variant=H'."""
    given = parse_arg(arg, recipe="", variant="", res=0, runlocal=False)
    if given.recipe not in RECIPES:
        raise UserError(f"unknown recipe {given.recipe!r}; known: paper")
    config = common("runs/vlp")
    config.task = "vlp"
    config.init = "runs/pretrain/checkpoints"
    config.model = {"variant": given.variant, "overrides": model_overrides()}  # as config.init says
    config.fusion = {
        "variant": "",  # see models/fusion.py; '': the folder's, else by the size of the towers
        "overrides": fusion_overrides(),
        "begin": "joint",  # of a fresh one: in the joint space of the towers, where that fits; or 'random' (METER)
        "fusion_lr": 5.0,  # learning rate of the fusion over that of the towers,
        "head_lr": 5.0,  # of its heads
        "freeze": "",  # towers that are not trained: image | text | both
    }
    config.itm = {
        "negatives": "batch",  # where the image of a text that does not match is from: batch | dataset | hard
        "captions": 8,  # most different captions of an image, which are no negatives of it (batch, hard)
        "weight": 1.0,  # of the loss; 0: without it
    }
    config.mlm = {
        "share": 0.15,  # of the tokens that are masked
        "whole_words": True,
        "weight": 1.0,
    }
    config.micro_batch = {"images": 0, "texts": 0}  # so many of a device at once; 0: all
    config.data.train = "scene_captions:train"
    config.data.test = ""  # held-out pairs, several joined by '|'; '': of scenes the held-out splits
    config.data.captions = ""  # fields and weights; '': "captions=1" where records have that list, else "caption=1"
    config.data.train_ops = config.data.eval_ops = "decode|resize_exact({res})"  # a flip would change what is true
    config.language = {  # what reads the texts
        "init": "",  # a folder with RoBERTa (import_torch --from=roberta); '': that of config.init, or its text tower
        "length": config_dict.placeholder(int),  # tokens of a text; of a text tower config.model.overrides.text_length
    }
    config.text = {"tokenizer": ""}  # '': the one that the weights were trained with
    config.optim.schedule, config.optim.final_fraction = "linear", 0.0
    config.optim.weight_decay = 0.01
    if given.recipe:
        _paper(config)
    else:
        _laptop(config)
    if given.res:
        config.model.overrides.update(res=given.res, window=None)
    if given.runlocal:
        _runlocal(config)
    return config


def _laptop(config: ConfigDict) -> None:
    """Some minutes on two CPU cores, on scenes, with what was found to learn a match in that time.

    The towers keep what aligns them, from which a fusion in their joint space begins, and masked words weigh less. All
    pictures are of one source: beside one of another a text is told by that alone.
    """
    config.batch_size, config.total_steps = 64, 1500
    config.fusion.freeze = "both"
    config.optim.learning_rate, config.optim.warmup_steps = 2e-4, 75
    config.mlm.weight = 0.2
    config.eval.every, config.eval.batch_size, config.log.every = 0, 64, 25
    config.data.workers = 0


def _paper(config: ConfigDict) -> None:
    """384 pixels, ITM and MLM (Florence, section 3.4); batch, steps, rates, lengths as METER has them."""
    config.workdir += "_paper"
    config.model.overrides.update(res=384, text_length=50)
    config.data.train = ""
    config.data.train_ops = config.data.eval_ops = "decode|resize({res})|center_crop({res})"
    config.itm.negatives, config.fusion.begin = "dataset", "random"
    config.batch_size, config.total_steps = 4096, 147_000  # 43 epochs of 14 M images
    config.optim.learning_rate, config.optim.warmup_steps = 1e-5, 14_700
    config.eval.every, config.eval.batch_size = 5000, 256


def _runlocal(config: ConfigDict) -> None:
    """Two minutes."""
    config.model.overrides.update(res=32, window=4)
    config.fusion.overrides.update(layers=1, width=16, head_width=8)
    config.batch_size, config.data.workers, config.eval.batch_size = 8, 0, 8
    config.total_steps, config.log.every, config.optim.warmup_steps = 2, 1, 1
    config.workdir += "_runlocal"
