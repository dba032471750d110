"""What fine-tuning takes where the configuration leaves it open: from the size of the set, the batch and the model."""

import math

from florence_jax.tasks.base import RunDefaults

LARGE = 100_000  # images, from which on the paper's recipe is taken
PAPER = RunDefaults(batch_size=8192, epochs=10, learning_rate=2e-5, warmup_steps=500)  # of ImageNet, table 3
# Nothing says that a class of one's own looks the same in a mirror: digits, letters and arrows do not.
PAPER_OPS = "decode|rrc({res}, scale=(0.5, 1.0))|flip(0.5)"
OWN_OPS = "decode|rrc({res}, scale=(0.5, 1.0))"
BATCHES = (16, 128)
STEPS_AN_EPOCH = 12  # at least so many, as long as a batch has 16 images
STEPS = 300
EPOCHS = (10, 100)
RATE = 3e-4  # of a batch of 64 and features of 256 values


def fine_tuning_recipe(examples: int | None, width: int, batch_size: int | None = None) -> RunDefaults:
    """The paper's recipe for sets of its size, and where nobody counted the images; for smaller ones a choice of ours.

    A batch is a power of two and about a twelfth of the images, the run 300 steps long, but 10 to 100 epochs. The
    learning rate grows with the root of the batch, as Adam's noise wants it, and falls with the width of the features.

    Args:
      examples: images that are trained on.
      width: of the features of the image tower.
      batch_size: where it is given.
    """
    if examples is None or examples >= LARGE:
        return PAPER
    least, most = BATCHES
    fitting = 2 ** int(math.log2(max(examples / STEPS_AN_EPOCH, 1)))
    batch = batch_size or min(max(fitting, least), most)
    epochs = min(max(round(STEPS * batch / max(examples, 1)), EPOCHS[0]), EPOCHS[1])
    return RunDefaults(batch, epochs, RATE * math.sqrt(batch / 64) * 256 / width, PAPER.warmup_steps)


KINETICS = RunDefaults(batch_size=64, epochs=30, learning_rate=2e-4, warmup_steps=10_000)  # paper; warm-up: Video Swin
MANY_VIDEOS = 20_000  # from which on its recipe is taken
VIDEO_STEPS, VIDEO_BATCH = 600, 16
VIDEO_RATE = 3e-4  # of that batch and features of 256 values


def video_recipe(examples: int | None, width: int, batch_size: int | None = None) -> RunDefaults:
    """The paper's recipe for Kinetics for sets of its size, and where nobody counted the videos; for smaller ones ours.

    It is 600 steps of 16 clips, of 8 where there are not as many, but at least 10 epochs. The learning rate goes with
    the root of the batch, as Adam's noise wants it, and falls with the width.

    Args:
      examples: videos that are trained on.
      width: of the features of the video tower.
      batch_size: where it is given.
    """
    if examples is None or examples >= MANY_VIDEOS:
        return KINETICS
    batch = batch_size or VIDEO_BATCH // (1 if examples >= VIDEO_BATCH else 2)
    epochs = max(round(VIDEO_STEPS * batch / max(examples, 1)), EPOCHS[0])
    return RunDefaults(batch, epochs, _video_rate(batch, width), DETECTION_WARMUP)


def _video_rate(batch: int, width: int) -> float:
    return VIDEO_RATE * math.sqrt(batch / VIDEO_BATCH) * 256 / width


MOTION_STEPS = 2000


def motion_recipe(examples: int | None, width: int, batch_size: int | None = None) -> RunDefaults:
    """Of motion clips, which are as many as one likes: 2,000 steps of 16, at the rate of `video_recipe`.

    Args:
      examples: clips that are trained on; None: as many as those steps take.
      width, batch_size: as there.
    """
    batch, clips = batch_size or VIDEO_BATCH, MOTION_STEPS * VIDEO_BATCH
    epochs = max(round(clips / (examples or clips)), 1)
    return RunDefaults(batch, epochs, _video_rate(batch, width), DETECTION_WARMUP)


DYHEAD = RunDefaults(batch_size=32, epochs=12, learning_rate=1e-4, warmup_steps=1000)  # of COCO
MANY_BOXED = 20_000  # images with boxes, from which on its recipe is taken
DETECTION_STEPS = 1000
DETECTION_BATCH = 16
DETECTION_RATE = 6e-4  # of that batch and a detector of 64 channels
DETECTION_WARMUP = 100


def detection_recipe(examples: int | None, width: int, batch_size: int | None = None) -> RunDefaults:
    """DyHead's recipe for sets of its size, and where nobody counted the images; for smaller ones a choice of ours.

    It is 1,000 steps of 16 images, of 8 where there are not as many, but at least 12 epochs. The learning rate goes
    with the root of the batch, as Adam's noise wants it, and falls with the width.

    Args:
      examples: images that are trained on.
      width: channels of the detector.
      batch_size: where it is given.
    """
    if examples is None or examples >= MANY_BOXED:
        return DYHEAD
    batch = batch_size or DETECTION_BATCH // (1 if examples >= DETECTION_BATCH else 2)
    epochs = max(round(DETECTION_STEPS * batch / max(examples, 1)), DYHEAD.epochs)
    rate = DETECTION_RATE * math.sqrt(batch / DETECTION_BATCH) * 64 / width
    return RunDefaults(batch, epochs, rate, DETECTION_WARMUP)


FEW_SHOT_BATCH, FEW_SHOT_EPOCHS = 8, 100
FEW_SHOT_STEPS = (200, DETECTION_STEPS)  # at least, at most


def few_shot_recipe(examples: int | None, width: int, batch_size: int | None = None) -> RunDefaults:
    """Of a detector that is adapted on a few images: batches of 8, 100 times each image, but 200 to 1,000 steps.

    The learning rate is that of `detection_recipe`; for larger sets, and where nobody counted the images, all of it is.

    Args:
      examples: images that are trained on.
      width: channels of the detector.
      batch_size: where it is given.
    """
    least, most = FEW_SHOT_STEPS
    batch = batch_size or FEW_SHOT_BATCH
    if examples is None or FEW_SHOT_EPOCHS * examples >= most * batch:
        return detection_recipe(examples, width, batch_size)
    steps = max(FEW_SHOT_EPOCHS * examples // batch, least)
    epochs = -(-steps // max(examples // batch, 1))
    return detection_recipe(examples, width, batch)._replace(batch_size=batch, epochs=epochs)


METER_VQA = RunDefaults(batch_size=512, epochs=10, learning_rate=8e-6, warmup_steps=10_000)  # rate of the paper
MANY_ASKED = 50_000  # images with questions, from which on its recipe is taken
VQA_STEPS, VQA_BATCH, VQA_EPOCHS = 1200, 16, (1, 100)
VQA_WARMUP = 120
VQA_RATE, VQA_TUNED_RATE = 2e-4, 6e-5  # of the towers, for that batch: with a fresh fusion, and with a trained one


def question_recipe(images: int | None, each: int, trained: bool, batch_size: int | None = None) -> RunDefaults:
    """Of question answering: METER's for sets of its size, and where nobody counted; for smaller ones a choice of ours.

    It is 1,200 steps of 16 images with their questions, but 1 to 100 epochs. A warm-up is at most a tenth of the steps.

    Args:
      images: that are trained on.
      each: questions of an image in a batch.
      trained: whether the fusion is, or begins anew. batch_size: in images, where it is given.
    """
    if images is None or images >= MANY_ASKED:
        return METER_VQA._replace(batch_size=max(METER_VQA.batch_size // each, 1))
    batch = batch_size or VQA_BATCH
    epochs = min(max(round(VQA_STEPS * batch / max(images, 1)), VQA_EPOCHS[0]), VQA_EPOCHS[1])
    rate = VQA_TUNED_RATE if trained else VQA_RATE
    return RunDefaults(batch, epochs, rate * math.sqrt(batch / VQA_BATCH), VQA_WARMUP)
