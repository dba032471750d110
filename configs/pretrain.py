"""Image-text pretraining with the UniCL loss.

    python -m florence_jax.main --config=configs/pretrain.py             # laptop: 'ti' on the embedded emoji pairs
    python -m florence_jax.main --config=configs/pretrain.py:runlocal    # two-minute smoke test of the same
    python -m florence_jax.main --config=configs/pretrain.py:variant=H,res=224 --workdir=/shared/run \
        --config.data.train=gs://bucket/pairs --config.batch_size=24576

Arguments: variant = ti | T | S | B | L | H; res = image size (0: the stage's); stage = 1 | 2 | 3 of the paper's
schedule (see `STAGES`; docs/stages.md has the commands); runlocal. Held out: --config.data.test=IMAGES (with classes)
for zero-shot classification, --config.eval.source=PAIRS for retrieval.
The first command was run on 2 CPU cores (see README for times and results); T to H have been compiled and stepped
on random data only, never trained to convergence by this project.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.models.sizes import VARIANTS
from florence_jax.train.defaults import common, model_overrides

TRAIN_OPS = "decode|rrc({res}, scale=(0.5, 1.0), interpolation=bilinear)|flip(0.5)|jitter(0.4, 0.4, 0.4)"
# Of every variant under 'runlocal': minutes on a laptop, with the variant's own tokens, pooling and masks.
RUNLOCAL_SIZES = {
    "res": 32,
    "window": 4,
    "image_width": 32,
    "depths": (2, 2, 2, 2),
    "text_width": 128,
    "text_heads": 4,
    "text_layers": 2,
}


class Stage(NamedTuple):
    """A stage of the paper's schedule (arXiv 2111.11432, section 2.2), which gives steps, prompts and pixels.

    Attributes:
      steps: of size H.
      prompts: whether prompt templates are put around captions of one or two words.
      fine: at 384 instead of 224 pixels, with windows of 12 instead of 7 (ti: 48 instead of 32, 6 instead of 4).
      learning_rate: peak, as a share of the first stage's. A choice of ours; the paper gives none.
    """

    steps: int
    prompts: bool
    fine: bool
    learning_rate: float


STAGES = {
    1: Stage(1_000_000, prompts=True, fine=False, learning_rate=1.0),
    2: Stage(180_000, prompts=False, fine=False, learning_rate=0.2),
    3: Stage(80_000, prompts=False, fine=True, learning_rate=0.1),
}
FINE_RES = {224: 384, 32: 48}


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'variant=B,res=384,stage=3'."""
    given = parse_arg(arg, variant="ti", res=0, stage=1, runlocal=False)
    if given.variant not in VARIANTS:
        raise UserError(f"unknown variant {given.variant!r}; known: {', '.join(VARIANTS)}")
    if given.stage not in STAGES:
        raise UserError(f"unknown stage {given.stage}; the schedule has stages 1, 2 and 3")
    config = common("runs/pretrain")
    config.task = "pretrain"
    config.precision = "auto"  # float32; on processors that have them with products of bfloat16 factors
    config.model = {"variant": given.variant, "overrides": model_overrides()}
    if given.runlocal:
        config.model.overrides.update(RUNLOCAL_SIZES)
    res = config.model.overrides.res or VARIANTS[given.variant]["res"]
    if STAGES[given.stage].fine and not given.res and res not in FINE_RES:
        raise UserError(f"stage {given.stage} after {res} pixels of {given.variant}: say its size, such as res=448")
    if res := given.res or (FINE_RES[res] if STAGES[given.stage].fine else 0):
        config.model.overrides.update(res=res, window=None)
        if given.runlocal:
            config.model.overrides.window = res // 8
    config.data.train = "emoji:train"  # sources joined by '|', each with an optional '*weight'
    config.data.train_ops = TRAIN_OPS
    # Record fields that captions are drawn from, with weights; '|' between the fields of several texts a picture.
    config.data.captions = ""  # '': "captions=1" where records have that list, else "caption=1"
    config.text = {
        "tokenizer": "sentencepiece",  # shipped model; or a .model file, or a CLIP BPE vocabulary file
        "templates": STAGES[given.stage].prompts,  # prompts around one- and two-word captions
        "extra_captions": "",  # with data.captions='': fields of a second text, where records have any of them
        "subword_sampling": 0.0,  # share of training texts that are split into pieces at random (SentencePiece only)
    }
    config.loss = "unicl"  # or 'clip': every pair its own class
    config.grad_cache = {
        "micro_batch": 0,  # pairs per device encoded together; must divide batch_size / devices. 0: no gradient cache
        "towers": "both",  # or 'image': the texts are encoded at once
    }
    config.eval.every = 5000
    config.batch_size = 4096
    config.total_steps = STAGES[1].steps
    config.optim.warmup_steps = 2000
    if given.variant == "ti":
        _laptop(config)
    _shorten(config, STAGES[given.stage])
    if given.runlocal:
        _runlocal(config)
    return config


def _shorten(config: ConfigDict, stage: Stage) -> None:
    """Steps and learning rate of a later stage, in the paper's proportion to those of the first."""
    config.total_steps = config.total_steps * stage.steps // STAGES[1].steps
    config.optim.warmup_steps = min(config.optim.warmup_steps, config.total_steps // 10)
    config.optim.learning_rate = config.optim.learning_rate * stage.learning_rate


def _laptop(config: ConfigDict) -> None:
    """Five minutes on two CPU cores, on the embedded emoji pairs."""
    config.batch_size = 128
    config.total_steps = 1400
    config.optim.learning_rate = 8e-4
    config.optim.warmup_steps = 100
    config.optim.ema_decay = 0.998  # the mean of about 500 steps, of a shorter run of fewer
    # Drawings fill their frame more or less: zoom out as well as in, and never cut much away.
    affine = "affine(8, scale=(0.85, 1.15), shift=0.05, stretch=0.2)"
    square = "resize({res})|center_crop({res})"  # emoji are square already, your own pictures may not be
    # Photographs are kept at four times the size, not in full; emoji are smaller.
    config.data.train_ops = f"decode|shrink({{res}}, times=4)|{affine}|{square}|flip(0.5)|jitter(0.3, 0.3, 0.3)"
    # Two texts a picture: its name, and one of the rest. With one it learns more slowly, with more no better.
    config.text.extra_captions = "keywords_joined=1,keywords=1,group=2"
    config.text.subword_sampling = 0.2  # held-out names have words never seen: parts of words must mean something
    config.model.overrides.text_layers = 1
    config.model.overrides.text_length = 16  # names and keywords are short; longer captions of your own need more
    config.data.workers = 0  # two cores: decoding in the trainer's own threads is faster than worker processes
    config.data.cache = True  # of what `shrink` leaves
    config.checkpoint.every = 500
    config.eval.every = 0


def _runlocal(config: ConfigDict) -> None:
    """A smoke test of any variant: few steps at `RUNLOCAL_SIZES`, everything else as in the real run."""
    config.batch_size = 16
    config.total_steps = 20
    config.optim.ema_decay = 0.0
    config.optim.warmup_steps = 5
    config.checkpoint.every = 10
    config.log.every = 5
    config.data.workers = 0
    config.workdir = "runs/pretrain_runlocal"
    config.data.train = "emoji:train"
