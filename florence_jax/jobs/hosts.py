"""Several processes as one job: who takes part, and what happens when one is missing or lost."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from ml_collections import ConfigDict

from florence_jax.errors import UserError

EXIT_LOST = 69  # EX_UNAVAILABLE: another process is missing or lost; run the same command again to go on.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT_DISTANCE = 100  # from the coordinator's port to the watchers'
# An error here may be the consequence of another process's death: wait for the watchers to say so.
GRACE_SECONDS = 3.0
MEETING_SECONDS = 3600  # compilation may take long on one of the processes; a dead one is noticed by the watchers


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place in the job: the coordinator is process 0, at `address` (HOST:PORT)."""

    address: str
    count: int
    index: int
    local_devices: list[int] | None = None

    @property
    def watch_port(self) -> int:
        """Where process 0's watcher listens unless the configuration says otherwise."""
        port = int(self.address.rsplit(":", 1)[1])
        return port + PORT_DISTANCE if port + PORT_DISTANCE < 65536 else port - PORT_DISTANCE


def find_place(timeout: float) -> Place:
    """From the environment `VARIABLES` where all are set, else from the TPU slice, SLURM, Kubernetes or MPI.

    Args:
      timeout: seconds to wait for the cluster's own services.

    Raises:
      UserError: if neither says it, or the variables make no sense.
    """
    values = [os.environ.get(name) for name in VARIABLES]
    if all(values):
        address, count, index = values
        good = count.isdecimal() and index.isdecimal() and address.rpartition(":")[2].isdecimal() and ":" in address
        if not good or not int(index) < int(count):
            raise UserError(
                f"{', '.join(f'{n}={v}' for n, v in zip(VARIABLES, values, strict=True))}: give HOST:PORT of process "
                "0, the number of processes, and this one's number, from 0 to count - 1"
            )
        return Place(address, int(count), int(index))
    address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
        values[0], None, None, None, None, int(timeout)
    )
    if address is None or count is None or index is None:
        raise UserError(
            "config.distributed=True, but this is no TPU slice, SLURM, Kubernetes or MPI job: set "
            f"{', '.join(VARIABLES)} on every host"
        )
    return Place(address, count, index, local)


class Watch:
    """This process's watcher, see `roll_call.py`."""

    def __init__(self, place: Place, options: ConfigDict):
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "florence_jax.jobs.roll_call"),
                *(f"--index={place.index}", f"--count={place.count}", f"--address={place.address}"),
                f"--port={options.port or place.watch_port}",
                f"--start-timeout={options.start_timeout}",
                f"--lost-after={options.lost_after}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def wait_for_all(self) -> None:
        """Returns when all processes have come. Where one has not, the watcher says so, and this process ends."""
        if self._process.stdout.readline().strip() != "ready":
            leave(EXIT_LOST)
        threading.Thread(target=self._listen, daemon=True, name="hosts").start()

    def _listen(self) -> None:
        if self._process.stdout.readline().strip() == "end":
            leave(EXIT_LOST)

    def say(self, text: str) -> None:
        """A command to the watcher; one whose job has ended is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()


def meet(name: str) -> None:
    """Waits until every process of the job has come to the point `name`; at once in a job of one process.

    Unlike a collective it can wait for long: on CPUs (Gloo) the first collective gives up after 30 s.
    """
    if (client := distributed.global_state.client) is not None:
        client.wait_at_barrier(f"florence_jax:{name}", MEETING_SECONDS * 1000)


def leave(code: int) -> None:
    """Ends this process at once: Python's own way out waits for the other processes, which cannot answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def joined(options: ConfigDict) -> Iterator[None]:
    """The processes of the job are connected inside; on an error in one of them, all end.

    Args:
      options: `config.hosts`.

    Raises:
      UserError: as `find_place`.
    """
    place = find_place(options.start_timeout)
    if place.count == 1:
        yield
        return
    watch = Watch(place, options)
    watch.wait_for_all()
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(options.start_timeout),
            # The watchers are first, and name the process; JAX's own check is behind them.
            heartbeat_timeout_seconds=int(2 * options.lost_after) + 10,
        )
        yield
        jax.distributed.shutdown()
    except BaseException as error:  # whatever it is, the others must not wait for this process
        reason = error.__context__ if isinstance(error, SystemExit) else error
        time.sleep(GRACE_SECONDS)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        watch.say(f"stopped {' '.join(str(reason).split())}")
        leave(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    watch.say("bye")
