"""One run a workdir: a lock file says which process writes there."""

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from florence_jax.errors import UserError
from florence_jax.jobs.hosts import meet

LOCK_FILE = "lock.json"
BEAT_SECONDS = 5.0  # between two signs of life
SILENCE_SECONDS = 30.0  # without one a process that cannot be looked at, on another host, is taken for dead
TIE_SECONDS = 0.2  # in which two that take over the same lock notice each other
Holder = dict[str, str | int]


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Inside, no other run uses `workdir`. Of a job of several processes, process 0 holds the lock for all.

    A lock left behind is taken over: at once where its process was on this host and is dead, and after
    `SILENCE_SECONDS` without a sign of life where it was on another host.

    Raises:
      UserError: if another run holds it; the message says which.
    """
    if jax.process_index():
        meet(LOCK_FILE)
        yield
        return
    file, own = workdir / LOCK_FILE, _own()
    _take(file, own)
    meet(LOCK_FILE)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, ended), daemon=True, name="lock")
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(file) == own:
            file.unlink(missing_ok=True)


def _own() -> Holder:
    """This process, and a mark by which it knows its own lock."""
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid()), "since": since, "mark": uuid.uuid4().hex}


def _host() -> str:
    """This machine, or this container on it: where numbers of processes mean the same."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _born(pid: int) -> str:
    """When a process of this machine began, in the system's own terms; '' if there is none.

    A number alone is given again: after a restart of the machine or of a container often to the same program.
    """
    if sys.platform.startswith("linux"):
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
        except OSError:
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "of another user"
    return "unknown"


def _take(file: Path, own: Holder) -> None:
    while not _create(file, own):
        holder, beat = _read(file), _last_beat(file)
        alive = _alive(file, holder, beat)
        now = _read(file)
        if alive and now:
            raise UserError(
                f"{file.parent} is in use by another run: {_named(now)}. Stop it there, or choose another --workdir"
            )
        if not alive and now == holder:
            print(f"taking over {file.parent}, which {_named(holder)} left without a word", flush=True)
            file.unlink(missing_ok=True)
    time.sleep(TIE_SECONDS)
    if (now := _read(file)) != own:
        raise UserError(f"{file.parent} was taken at the same moment by another run: {_named(now)}")


def _alive(file: Path, holder: Holder, beat: int | None) -> bool:
    """Whether the holder of a lock is alive, as far as can be told; also if the lock changes, or goes."""
    if holder.get("host") == _host():
        return _born(int(holder["pid"])) == holder["born"]
    if holder:
        print(
            f"{file.parent} is locked by {_named(holder)}: waiting up to {SILENCE_SECONDS:g} s for a sign of life",
            flush=True,
        )
    deadline = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        if _last_beat(file) != beat:
            return True
    return False


def _beat(file: Path, ended: threading.Event) -> None:
    """Marks the lock from time to time; where the file system does not answer, later."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file)


def _last_beat(file: Path) -> int | None:
    """When the lock was last marked, by the clock of the file system; None if there is none."""
    try:
        with file.open("rb") as opened:  # opened, because network file systems look again only then
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


def _create(file: Path, own: Holder) -> bool:
    """False where there is one."""
    try:
        with file.open("x") as opened:
            json.dump(own, opened)
        return True
    except FileExistsError:
        return False


def _read(file: Path) -> Holder:
    """{} where there is none, or it was not written to its end."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _named(holder: Holder) -> str:
    """For people."""
    if not holder:
        return "an unknown process"
    return f"process {holder['pid']} on {str(holder['host']).split()[0]}, since {holder['since']}"
