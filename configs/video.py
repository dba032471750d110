"""Video: actions by a video tower inflated from the image tower, and videos found or classified by text.

    python -m florence_jax.main --config=configs/video.py                 # motion clips, from runs/pretrain (laptop)
    python -m florence_jax.main --config=configs/video.py --config.data.train=my_clips --config.init=DIR   # your own
    python -m florence_jax.main --config=configs/video.py:protocol=eval --config.init=runs/video --config.data.test=DATA
    python -m florence_jax.main --config=configs/video.py:protocol=probe --config.init=DIR --config.data.train=DATA
    python -m florence_jax.main --config=configs/video.py:protocol=zeroshot --config.init=DIR --config.data.test=DATA
    python -m florence_jax.main --config=configs/video.py:protocol=retrieval --config.init=DIR --config.data.test=DATA
    python -m florence_jax.main --config=configs/video.py:protocol=finetune --config.init=DIR --config.data.train=DATA
    python -m florence_jax.main --config=configs/video.py:protocol=check --config.data.train=DATA
    python -m florence_jax.main --config=configs/video.py:recipe=k400,res=384 --config.init=DIR \
        --config.data.train=DATA --config.data.test=DATA

Data: a folder with a sub-folder of videos for each class, motions:SPLIT, or another source of videos; see
docs/video.md.
`--config.init` is the workdir of a run (the default is that of configs/pretrain.py) or a folder written by
florence_jax.tools.import_torch. Results are in WORKDIR/result.json, predictions.csv and report.html.

Arguments: protocol = train | eval (a trained classifier on config.data.test) | probe (logistic regression on frozen
features of config.video.tower) | zeroshot (actions by the names of their classes) | retrieval (videos with captions, by
text and the other way round) | finetune (for retrieval, on videos with captions by the UniCL loss) | check (a report of
data, without weights); recipe = k400 | k600 | ssv2 (the paper's figures where it gives some, Video Swin's where not;
never run here), without one batch, epochs and learning rate follow the number of videos; variant = size of the towers,
for a preflight without weights; res = side of the frames in pixels (0: the weights' own); runlocal.

A preflight (florence_jax.tools.aot_compile) needs neither weights nor data: --config.init= --config.data.train= and
variant=NAME, --config.classes=NAMES for the size of the classifier.
"""

from ml_collections import ConfigDict, config_dict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.train.defaults import common, model_overrides, video_overrides

PROTOCOLS = ("train", "eval", "probe", "zeroshot", "retrieval", "finetune", "check")
RECIPES = ("k400", "k600", "ssv2")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'protocol=retrieval'."""
    given = parse_arg(arg, protocol="train", recipe="", variant="", res=0, runlocal=False)
    for name, value, known in (("protocol", given.protocol, PROTOCOLS), ("recipe", given.recipe, ("", *RECIPES))):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; known: {', '.join(filter(None, known))}")
    trains = given.protocol in ("train", "finetune")
    config = common("runs/video" if given.protocol == "train" else f"runs/video_{given.protocol}")
    config.task, config.protocol = "video", given.protocol
    config.mode = "train" if trains else "eval"
    config.init = "runs/video" if given.protocol == "eval" else "runs/pretrain/checkpoints"
    config.model = {"variant": given.variant, "overrides": model_overrides()}  # as config.init says
    if given.res:
        config.model.overrides.res = given.res
    _video(config, given.protocol)
    config.data.train = "motions:train" if trains and not given.recipe else ""  # videos with their classes
    config.data.test = ""  # held-out ones; '': `holdout` of each class of data.train; of motion clips others of those
    config.data.train_ops = ""  # '': a random clip, crops; mirrored too in large sets no class of which names a side
    config.data.eval_ops = ""  # '': the views of video.clips and video.crops; of other protocols frames spread by time
    config.holdout = 0.2  # share of each class that is kept for testing, where no such videos are named
    config.validation = ""  # videos to choose the probe's C on; '': `holdout` of each class of data.train
    config.classes = ""  # a file of class names; '': the data's own labels
    config.label_field = ""  # record field with the class; '': class_id, or caption
    config.templates = ""  # zeroshot: a set's name or a file; '': three of persons who do something
    config.metric = ""  # top1 | mean_per_class; '': top1
    config.probe = {"sklearn": False}
    config.label_smoothing = 0.0  # share of the target that is spread over all classes
    config.text = {"tokenizer": ""}
    config.batch_size = config_dict.placeholder(int)  # None, here and below: by the number of videos
    config.epochs = config_dict.placeholder(int)
    config.total_steps = 0  # above 0 it overrides epochs
    config.eval.every, config.eval.batch_size = 0, 16
    config.optim.learning_rate = config_dict.placeholder(float)
    config.optim.warmup_steps = config_dict.placeholder(int)  # at most a tenth of the steps
    config.optim.layer_decay = 1.0  # learning rate of each layer over that of the one above it
    config.optim.weight_decay, config.optim.b2 = 0.05, 0.999
    if given.recipe:
        _published(config, given.recipe)
    if given.runlocal:
        _runlocal(config)
    return config


def _video(config: ConfigDict, protocol: str) -> None:
    """The video tower, and how a video is looked at."""
    frames_alone = protocol in ("zeroshot", "retrieval")
    config.video = {
        "overrides": video_overrides(),  # None: as the folder's, else the defaults; 8 frames for towers ti, else 32
        "tower": "image" if frames_alone else "video",  # of probe, zeroshot, retrieval: image = frames, averaged
        "interval": config_dict.placeholder(int),  # from one frame of a clip to the next: 2
        "clips": config_dict.placeholder(int),  # of a video in a test: 4
        "crops": config_dict.placeholder(int),  # of each clip in a test, 1 or 3: 3
        "tower_lr": 1.0,  # learning rate of the video tower over the classifier's; 0: frozen
        "table_lr": 30.0,  # of its bias tables over that of the tower; they are what tells before from after
        # An inflated tower is blind to the direction of time; noise that it is not. None: 1 where classes are each
        # other's reversal in time by name, else 0.
        "inflate_noise": config_dict.placeholder(float),
        # Each clip also backwards, as the class that is its reversal in time by name; None: of motion clips only.
        "reversed": config_dict.placeholder(bool),
        # None, of both: where classes are each other's reversal in time by name.
        "shuffled": config_dict.placeholder(bool),  # also test with the frames of each clip in random order
        "probed": config_dict.placeholder(int),  # training videos of a probe of single frames; 0: none; None: 2,000
        "embedded_frames": (8,) if protocol == "zeroshot" else (1, 4, 8, 16),  # zeroshot, retrieval: frames of a video
        "dual_softmax": False,  # retrieval: also with knowledge of all queries, under a name of its own
    }


def _published(config: ConfigDict, recipe: str) -> None:
    """Kinetics: 30 epochs, label smoothing, lr 2e-4, drop path .5, 4 x 3 views (the paper); the rest Video Swin's."""
    config.workdir += f"_{recipe}"
    config.batch_size, config.epochs, config.label_smoothing = 64, 60 if recipe == "ssv2" else 30, 0.1
    config.optim.learning_rate, config.video.tower_lr = 2e-4, 0.1
    config.video.table_lr, config.video.inflate_noise = 1.0, 0.0
    video = config.video
    video.overrides.frames, video.overrides.drop_path, video.interval = 32, 0.4 if recipe == "ssv2" else 0.5, 2
    video.clips, video.crops = (1, 3) if recipe == "ssv2" else (4, 3)
    video.shuffled, video.probed = False, 0
    crops = "rrc({res}, scale=(0.08, 1.0), field=video)|randaugment(field=video)"
    if recipe == "ssv2":  # classes say left and right
        config.data.train_ops = f"segments(32, short=256)|{crops}|erase(0.25)"
        config.data.eval_ops = "segments(32, middle=True, short={res})|resize({res}, field=video)|three_crops({res})"
        config.data.eval_ops += "|split_views(32)"
    else:
        config.data.train_ops = f"clip(32, interval=2, short=256)|{crops}|flip(0.5, field=video)"


def _runlocal(config: ConfigDict) -> None:
    """A minute."""
    config.batch_size, config.data.workers, config.eval.batch_size = 8, 0, 8
    config.total_steps, config.log.every = 2, 1
    config.video.overrides.frames, config.video.clips, config.video.crops = 4, 2, 1
    config.video.embedded_frames = (2,)
    config.video.probed = 0
    config.workdir += "_runlocal"
