"""Detection: a Dynamic Head on an image tower, trained and scored as COCO does, on scenes or on boxes of your own.

    python -m florence_jax.main --config=configs/detect.py                # scenes, from runs/pretrain (laptop)
    python -m florence_jax.main --config=configs/detect.py --config.data.train=my_folder --config.init=DIR
    python -m florence_jax.main --config=configs/detect.py:recipe=coco,variant=H --config.init=DIR \
        --config.data.train=coco:instances_train2017.json:train2017 \
        --config.data.test=coco:instances_val2017.json:val2017
    python -m florence_jax.main --config=configs/detect.py:protocol=fewshot,shots=5 --config.init=DIR \
        --config.data.train=my_folder/train --config.data.test=my_folder/test
    python -m florence_jax.main --config=configs/detect.py:protocol=eval --config.init=DIR --config.data.test=my_folder
    python -m florence_jax.main --config=configs/detect.py:protocol=check --config.data.test=my_folder
    python -m florence_jax.main --config=configs/detect.py:recipe=proposals   # where things are, whatever their class
    python -m florence_jax.main --config=configs/detect.py:protocol=zeroshot --config.init=DIR_OF_PROPOSALS \
        --config.data.test=my_folder                                          # classes by name, never trained on

Data with boxes: coco:FILE.json:IMAGES, voc:FOLDER, boxes:FILE.csv, a folder that holds one of these, records of the
FLOD builder, scenes:SPLIT, lvis:FILE.json:IMAGES, objects365:FILE.json:IMAGES, openimages:FOLDER, vg:FOLDER; see
docs/detection.md. `--config.init` is the workdir of a run (the default is that of
configs/pretrain.py) or a folder written by florence_jax.tools.import_torch. Results are in WORKDIR/result.json,
detections_NAME.json (COCO's result file) and report.html.

Arguments: protocol = train | fewshot (on few pictures of each class, shots = 5 of them, drawn by --config.seed) |
eval (a trained detector on config.data.test) | check (a report of a data set) | zeroshot (a class-agnostic detector,
its proposals classified by the names of the classes of config.data.test);
recipe = coco | objects365 | vg | flod (the paper's figures where it gives some, DyHead's where not; never run here; vg
learns attributes too, flod trains the detector alone, on records of the FLOD builder or sets joined by '|') | proposals
(a class-agnostic detector on a frozen encoder, for protocol=zeroshot); without one, and of proposals,
batch, epochs and learning rate follow the number of images; variant = size of the towers, for a preflight without
weights; res = shorter side of the buckets in pixels; runlocal.

A preflight (florence_jax.tools.aot_compile) needs neither weights nor data: --config.init= and variant=NAME.
"""

from ml_collections import ConfigDict, config_dict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.train.defaults import common, detector_overrides, model_overrides

PROTOCOLS = ("train", "fewshot", "eval", "check", "zeroshot")
PROPOSALS = "proposals"  # a recipe without sizes of its own
# (height, width) of the buckets of a recipe. COCO: longer side 2,500 (paper), shorter 1,500 as in 800 x 1,333.
# Objects365: longer side 1,333 (paper), shorter 800. Visual Genome: 3,000 (paper), shorter 1,800. All at the next
# multiples of 128.
RECIPES = {
    "coco": ((1536, 2560), (1536, 2048), (1536, 1536), (2048, 1536), (2560, 1536)),
    "objects365": ((896, 1408), (896, 1152), (896, 896), (1152, 896), (1408, 896)),
    "vg": ((1920, 3072), (1920, 2560), (1920, 1920), (2560, 1920), (3072, 1920)),
}
RECIPES["flod"] = RECIPES["objects365"]  # the paper does not say; by far most of its boxes are of such sets


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'recipe=coco,variant=H'."""
    given = parse_arg(arg, protocol="train", recipe="", shots=5, variant="", res=0, runlocal=False)
    recipes = ("", *RECIPES, PROPOSALS)
    for name, value, known in (("protocol", given.protocol, PROTOCOLS), ("recipe", given.recipe, recipes)):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; known: {', '.join(filter(None, known))}")
    trains = given.protocol in ("train", "fewshot")
    config = common("runs/detect" if given.protocol == "train" else f"runs/detect_{given.protocol}")
    config.task, config.protocol = "detect", given.protocol
    config.mode = "train" if trains else "eval"
    inits = {"train": "runs/pretrain/checkpoints", "zeroshot": "runs/proposals"}
    inits |= dict.fromkeys(("fewshot", "eval"), "runs/detect")
    config.init = inits.get(given.protocol, "")
    config.model = {"variant": given.variant, "overrides": model_overrides()}  # as config.init says
    _detector(config, given.res)
    config.keep_zero_shot = ()  # also evaluate (1 - a) first + a trained weights for each a (WiSE-FT), e.g. (0.5,)
    config.forgetting = {  # of a detector that is trained further
        "source": "",  # data whose AP is watched, before and after; of the classes that both detectors know; '': none
        "threshold": 0.05,  # a larger fall is warned of
        # Of a class-agnostic first detector classes are told by name, before and after, on the test sets too.
        "zero_shot": True,
        "region": "crops",  # crops | roi: as zero_shot.region of protocol=zeroshot
    }
    config.data.train = "scenes:train" if trains else ""  # several joined by '|' are one set
    config.data.test = ""  # several joined by '|'; '': `holdout` of the images of data.train; of scenes held-out ones
    config.shots = given.shots  # protocol fewshot: pictures of each class to train on; 0: all
    config.holdout = 0.2  # share of the images that are kept for testing, where no such images are named
    config.data.train_ops = "decode|lsj({height}, {width}, low=0.8, high=1.25)|flip(0.5)|pad_image({height}, {width})"
    config.data.eval_ops = ""  # '': the folder's detector's, else the whole picture, as large as its bucket
    config.text = {"tokenizer": ""}
    config.batch_size = config_dict.placeholder(int)  # None, here and below: by the number of images
    config.epochs = config_dict.placeholder(int)
    config.total_steps = 0  # above 0 it overrides epochs
    config.eval.every, config.eval.batch_size = 0, 16
    config.optim.learning_rate = config_dict.placeholder(float)
    config.optim.warmup_steps = config_dict.placeholder(int)  # at most a tenth of the steps
    config.optim.layer_decay = 1.0  # learning rate of each layer of the tower over that of the one above it
    config.optim.weight_decay, config.optim.b2 = 0.05, 0.999
    if given.protocol == "zeroshot":
        _zero_shot(config)
    if given.recipe == PROPOSALS:
        _proposals(config)
    elif given.recipe:
        _published(config, given.recipe)
    if given.runlocal:
        _runlocal(config)
    return config


def _detector(config: ConfigDict, res: int) -> None:
    """The detector, and what it gives."""
    config.detector = {
        "variant": "",  # tiny | dyhead | glip_l; '': the folder's, else tiny on towers ti and dyhead on larger ones
        "overrides": detector_overrides(),
        "res": res,  # shorter side, of which the buckets are made; 0: 256, of scenes one of 128 x 128
        "sizes": (),  # (height, width) of each bucket, multiples of 128; (): by res
        "scales": (1.0,),  # multi-scale training: every picture at each of these shares of its bucket
        "most_boxes": 100,  # of a picture in training; what is more is counted, and ignored
        "crowd": "ignore",  # what crowds and groups are in training: ignore | background (as the references have it)
        "unknown": "ignore",  # what nobody looked for in a picture: ignore | background (what has no box)
        "sampled_classes": 512,  # of more classes a step takes its batch's own and others, drawn by frequency^(1/2)
        "attributes": False,  # also learns the attributes of objects, where the set has them: vg:FOLDER
        "tower_lr": 1.0,  # learning rate of the image tower over the detector's; 0: frozen
        "agnostic": False,  # one class, "object", of all boxes, whatever their classes
    }
    config.detections = {  # None: as the folder's detector was trained to, else what is said here
        "threshold": config_dict.placeholder(float),  # least score of a class: .05
        "per_level": config_dict.placeholder(int),  # pairs of place and class that go on, of each level: 1,000
        "iou": config_dict.placeholder(float),  # above it the worse of two boxes of a class is dropped: .6
        "most": config_dict.placeholder(int),  # boxes of a picture: 100
        "scales": config_dict.placeholder(tuple),  # multi-scale testing, shares of the bucket, at most 1: (1.0,)
        "flip": config_dict.placeholder(bool),  # also in a mirror: False
        "root": config_dict.placeholder(bool),  # scores as their square roots, as ATSS's and GLIP's are: False
    }


def _proposals(config: ConfigDict) -> None:
    """A class-agnostic detector on frozen towers."""
    config.workdir, config.init = (at.replace("runs/detect", "runs/proposals") for at in (config.workdir, config.init))
    config.detector.agnostic, config.detector.tower_lr = True, 0.0


def _zero_shot(config: ConfigDict) -> None:
    """Classes by name; see docs/detection.md."""
    for name in ("threshold", "iou", "most"):  # of the proposals: below
        del config.detections[name]
    config.zero_shot = {
        "region": "crops",  # crops, each encoded as a picture | roi, of the map that the detector has seen
        "margin": 0.1,  # around each box, on each side, as a share of the side
        "square": True,  # crops are as wide as high; False: squashed
        "g": 0.5,  # score = objectness^(1-g) x class^g
        "proposals": 100,  # of a picture,
        "proposal_iou": 0.9,  # of two that overlap more the worse is dropped
        "iou": 0.5,  # the same of two boxes of a class, in the end
        "most": 100,  # boxes of a picture
        "background": True,  # one more class in the softmax, nothing, of a fixed logit
        "background_logit": 0.0,
        "temperature": config_dict.placeholder(float),  # that cosines are divided by; None: as it was trained
        "names": "",  # a file, a line each: NAME, or NAME OF THE SET = NAME | SYNONYM; '': the test set's own
        "templates": "",  # of prompts: a set's name or a file; '': CLIP's 80 and the bare name
    }


def _published(config: ConfigDict, recipe: str) -> None:
    """AdamW 1e-4, decay .05, batch 32, 12 epochs, steps at 2/3 and 8/9 (DyHead); sizes and multi-scale (the paper)."""
    config.workdir += f"_{recipe}"
    config.detector.variant, config.detector.sizes = "dyhead", RECIPES[recipe]
    config.data.train_ops = "decode|resize_fit({height}, {width})|flip(0.5)|pad_image({height}, {width})"
    config.batch_size, config.epochs = 32, 12
    config.optim.learning_rate, config.optim.warmup_steps = 1e-4, 1000
    config.optim.schedule, config.optim.step_at, config.optim.step_factor = "steps", (2 / 3, 8 / 9), 0.1
    if recipe == "flod":  # pretraining of the detector: 12 epochs, batch 128 (paper), on a frozen encoder
        config.batch_size, config.detector.tower_lr = 128, 0.0
        config.optim.learning_rate = 2e-4  # with the root of the batch, as Adam's noise wants it
        config.data.train = ""
    if recipe == "vg":  # 24 epochs, attributes (paper); what has no box is background, as it is scored
        config.epochs, config.detector.scales, config.detector.attributes = 24, (0.5, 0.75, 1.0), True
        config.detector.unknown, config.data.train = "background", ""
    if recipe == "coco":
        config.detector.scales = (0.5, 0.75, 1.0)
        config.detections.scales, config.detections.flip = (0.5, 0.75, 1.0), True


def _runlocal(config: ConfigDict) -> None:
    """Two minutes."""
    config.detector.overrides.width, config.detector.overrides.blocks = 16, 1
    config.detector.sizes, config.detector.scales = ((128, 256),), (1.0, 0.5)
    config.batch_size, config.data.workers, config.eval.batch_size = 8, 0, 8
    config.total_steps, config.log.every = 2, 1
    if config.optim.schedule == "steps":
        config.optim.step_at = (0.5,)  # two steps have room for one
    config.workdir += "_runlocal"
