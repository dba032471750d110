"""Test-wide settings: eight simulated CPU devices and no silent rank promotion."""

import os
import shutil
import signal
import tempfile

import jax
import pytest
from absl import flags, logging

# Programs compiled by one test are found by the others, by worker processes and by commands that tests start, until the
# run ends. The process that makes the folder removes it: worker processes inherit the variable.
CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="florence_jax_cache_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the time goes into compiling programs that run for milliseconds: LLVM's part of it is left out, here and in
# the commands that tests start; XLA's own passes are not. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Most of the rest goes into MLIR's code for each fusion: XLA's older emitters take a third of the time. LLVM gets each
# program whole: in parts, for threads that a test run has no cores for, a program takes a sixth longer. Flags are read
# with the first program. One that XLA does not know ends the process, so they are for versions that have them.
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and jax.__version_info__ < (0, 11):
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag.split("=")[0] not in given), given]).strip()
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
# Whatever the processor does fastest, float32 is multiplied in float32 here and in the commands that tests start.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "default")
jax.config.update("jax_default_matmul_precision", os.environ["JAX_DEFAULT_MATMUL_PRECISION"])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A test run that was started in the background ignores Ctrl-C and hang-ups, and so would the commands that tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# grain's worker processes read absl flags; outside an absl app they must be marked as parsed.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


# Files of more than half a minute: first, so that at the end no worker waits long for the other.
LONG = (
    "test_loop.py", "test_detect.py", "test_detector.py", "test_fusion.py", "test_detect_zero_shot.py", "test_vqa.py",
    "test_video.py", "test_vlp.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The rest stays in alphabetical order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_unconfigure():
    """Removes the compiled programs of this run."""
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def absl_verbosity():
    """Commands that tests and fixtures run in this process set it, and tests look for what is logged."""
    logging.set_verbosity(logging.WARNING)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of twenty pictures in four sub-folders, of all tests of a worker: none writes there."""
    from tiny_images import twenty_images  # it imports what must be imported after the settings above

    return twenty_images(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoints of a tiny run, its config.json beside them, of all tests of a worker: none writes there."""
    from tiny_images import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("weights"))
