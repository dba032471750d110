"""Several processes as one job: who takes part, and what happens when one is missing or lost."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from florence_jax.errors import EXIT_INTERRUPTED, UserError

EXIT_LOST = 69  # EX_UNAVAILABLE: another process is missing or lost; run the same command again to go on.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT_DISTANCE = 100  # from the coordinator's port to the watchers'
CLUSTER_PORT = 8476  # from which the watchers' is counted where JAX found the processes; TPU slices keep it free
# An error here may be the consequence of another process's death: wait for the watchers to say so.
GRACE_SECONDS = 3.0
MEETING_SECONDS = 3600  # compilation may take long on one of the processes; a dead one is noticed by the watchers


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """This process's place in the job: process 0 is at `address` (HOST:PORT)."""

    address: str
    count: int
    index: int

    @property
    def watch_port(self) -> int:
        """Where process 0's watcher listens unless the configuration says otherwise."""
        port = int(self.address.rsplit(":", 1)[1])
        return port + PORT_DISTANCE if port + PORT_DISTANCE < 65536 else port - PORT_DISTANCE


def process_from_environment() -> ProcessInfo | None:
    """From the environment `VARIABLES` where all are set, else None.

    Raises:
      UserError: if the variables make no sense.
    """
    values = [os.environ.get(name) for name in VARIABLES]
    if not all(values):
        return None
    address, count, index = values
    good = count.isdecimal() and index.isdecimal() and address.rpartition(":")[2].isdecimal() and ":" in address
    if not good or not int(index) < int(count):
        raise UserError(
            f"{', '.join(f'{n}={v}' for n, v in zip(VARIABLES, values, strict=True))}: give HOST:PORT of process "
            "0, the number of processes, and this one's number, from 0 to count - 1"
        )
    return ProcessInfo(address, int(count), int(index))


def connect_on_cluster(settings: Mapping[str, int]) -> ProcessInfo:
    """Connects the processes of a TPU slice, SLURM, Kubernetes or MPI job, as JAX finds them; this one's place.

    Process 0 tells the others where it is, for the watchers. Here JAX's own start comes before theirs, and it is JAX
    that names who is missing.

    Args:
      settings: time limits, for `jax.distributed.initialize`.

    Raises:
      UserError: if this is no such job, or its processes do not come together.
    """
    try:
        jax.distributed.initialize(**settings)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"config.distributed=True, but this is no TPU slice, SLURM, Kubernetes or MPI job whose processes come "
            f"together ({' '.join(str(error).split())[:300]}): set {', '.join(VARIABLES)} on every host"
        ) from error
    name = np.zeros(256, np.uint8)
    own = socket.getfqdn().encode()[: len(name)]
    name[: len(own)] = list(own)
    host = bytes(multihost_utils.broadcast_one_to_all(name)).rstrip(b"\0").decode()
    return ProcessInfo(f"{host}:{CLUSTER_PORT}", jax.process_count(), jax.process_index())


class Watch:
    """This process's watcher, see `roll_call.py`."""

    def __init__(self, place: ProcessInfo, options: ConfigDict):
        self._meetings: dict[str, threading.Event] = {}
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
        for line in self._process.stdout:
            word, _, name = line.strip().partition(" ")
            if word == "end":
                leave(EXIT_LOST)
            self._meeting(name).set()

    def _meeting(self, name: str) -> threading.Event:
        return self._meetings.setdefault(name, threading.Event())

    def meet(self, name: str) -> None:
        """Returns when all processes have called this with `name`."""
        self.say(f"meet {name}")
        if not self._meeting(name).wait(MEETING_SECONDS):
            raise UserError(f"not all processes came to {name!r} within {MEETING_SECONDS} s")
        del self._meetings[name]

    def say(self, text: str) -> None:
        """A command to the watcher; one whose job has ended is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()


_watches: list[Watch] = []  # the one of the job inside `joined`; none in a job of one process


def meet(name: str) -> None:
    """Waits until every process of the job has come to the point `name`; at once in a job of one process.

    Unlike a collective it can wait for long: on CPUs (Gloo) the first collective gives up after 30 s.
    """
    for watch in _watches:
        watch.meet(name)


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
      UserError: as `process_from_environment` and `connect_on_cluster`.
    """
    # The watchers are first, and name the process; JAX's own check is behind them.
    settings = {
        "initialization_timeout": int(options.start_timeout),
        "heartbeat_timeout_seconds": int(2 * options.lost_after) + 10,
    }
    known = process_from_environment()
    place = known or connect_on_cluster(settings)
    if place.count == 1:
        yield
        return
    watch = Watch(place, options)
    watch.wait_for_all()
    _watches.append(watch)
    try:
        if known:
            address = (place.address, place.count, place.index)
            jax.distributed.initialize(*address, cluster_detection_method="deactivate", **settings)
        yield
        jax.distributed.shutdown()
    except BaseException as error:  # whatever it is, the others must not wait for this process
        reason = error.__context__ if isinstance(error, SystemExit) else error
        time.sleep(GRACE_SECONDS)
        interrupted = isinstance(reason, KeyboardInterrupt)
        if not isinstance(error, SystemExit) and not interrupted:
            traceback.print_exc()
        watch.say(f"stopped {'by Ctrl-C' if interrupted else ' '.join(str(reason).split())}")
        code = error.code if isinstance(error, SystemExit) else EXIT_INTERRUPTED if interrupted else 1
        leave(code if isinstance(code, int) else 1)
    _watches.remove(watch)
    watch.say("bye")
