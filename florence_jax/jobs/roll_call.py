"""Watches over the processes of a job from beside them: `hosts.py` starts one watcher for each training process.

Process 0's watcher listens; the others connect to it. At the start it calls the roll: when somebody is missing after
`--start-timeout`, all that came are told who. Then every watcher sends a sign of life a few times in `--lost-after`
seconds. A training process that dies is noticed at once, by its own watcher; a machine that dies or drops out of the
network, by its silence. Process 0's watcher tells all others, and every watcher prints the same line and ends its own
training process. A program of its own, because JAX aborts a process whose coordinator died before Python can speak.

They also are where the processes wait for each other: one says that it has come to a point, and hears when all have.

Standard library only. Commands on stdin: 'bye', 'stopped REASON', 'meet NAME'. On stdout: 'ready' once all are there,
'met NAME' once all have said 'meet NAME', 'end' when the training process must end.
"""

import argparse
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any, NoReturn

POLL_SECONDS = 0.2
# Deaths that follow from one another come within moments: wait so long before naming the cause.
SETTLE_SECONDS = 0.6
END_SECONDS = 5.0  # to leave by oneself, after 'end'
Message = dict[str, Any]


class Lines:
    """One connection (or the training process's pipe) carrying lines."""

    def __init__(self, fd: int, sock: socket.socket | None = None):
        self.fd, self.sock, self.open = fd, sock, True
        self.index, self.host, self.finished = -1, "", False
        self.seen = time.monotonic()
        self._rest = b""

    def read(self) -> list[str]:
        """Complete lines that have arrived; sets `open` to False at the end of the stream."""
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.open, self.seen = bool(data), time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def send(self, message: Message) -> None:
        """Sends one JSON line; a broken connection shows when it is read."""
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False


class Watcher:
    """What the watchers of process 0 and of the others have in common. All times are in seconds."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.host = options, socket.gethostname()
        self.selector = selectors.DefaultSelector()
        self.parent = os.getppid()
        self.trainer = Lines(sys.stdin.fileno())
        self.selector.register(self.trainer.fd, selectors.EVENT_READ, self.trainer)
        self.beat = max(POLL_SECONDS, min(5.0, options.lost_after / 5))
        self._next_beat = 0.0

    def trainer_died(self) -> bool:
        """Whether the training process is gone without a word."""
        return os.getppid() != self.parent or not self.trainer.open

    def beat_due(self) -> bool:
        """True every `beat` seconds."""
        if time.monotonic() < self._next_beat:
            return False
        self._next_beat = time.monotonic() + self.beat
        return True

    def poll(self) -> list[Lines]:
        """Who has something to read, after at most `POLL_SECONDS`."""
        return [key.data for key, _ in self.selector.select(POLL_SECONDS)]

    def tell_trainer(self, word: str) -> None:
        """One line on stdout; a training process that is gone hears nothing."""
        try:
            os.write(sys.stdout.fileno(), word.encode() + b"\n")
        except OSError:
            self.trainer.open = False

    def end(self, reason: str) -> NoReturn:
        """Prints `reason` and ends the training process, by force if it does not leave by itself."""
        print(f"error: {reason}", file=sys.stderr, flush=True)
        self.tell_trainer("end")
        deadline = time.monotonic() + END_SECONDS
        while os.getppid() == self.parent and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
        if os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)
        sys.exit(0)


class Leader(Watcher):
    """Of process 0: calls the roll and decides who is lost."""

    def run(self) -> None:
        """Until the job ends."""
        options = self.options
        try:
            listener = socket.create_server(("", options.port), backlog=options.count)
        except OSError as error:
            self.end(f"cannot listen on port {options.port} for the other processes: {error}; set --config.hosts.port")
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, listener)
        self.members: dict[int, Lines] = {}
        self.dead: dict[int, str] = {}  # process -> how it was lost
        self.meetings: dict[str, set[int]] = {}  # name -> who has come
        self.decide_at = float("inf")
        started, ready = time.monotonic(), options.count == 1
        while True:
            for source in self.poll():
                if source is listener:
                    self._accept(listener)
                else:
                    self._hear(source)
            if not ready and len(self.members) == options.count - 1:
                ready = True
                self._tell_all({"ready": True})
                self.tell_trainer("ready")
            if not ready and time.monotonic() > started + options.start_timeout:
                self._end_all(self._missing())
            self._look_around()
            if time.monotonic() >= self.decide_at:
                self._end_all(self._verdict())

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.settimeout(END_SECONDS)
        member = Lines(sock.fileno(), sock)
        self.selector.register(sock, selectors.EVENT_READ, member)

    def _hear(self, source: Lines) -> None:
        for line in source.read():
            if source is self.trainer:
                self._obey(line)
            else:
                self._answer(source, line)
        if not source.open:
            self.selector.unregister(source.fd)
            if source.sock is not None:
                source.sock.close()
            if source.index >= 0 and not source.finished:
                self._lose(source.index, f"process {source.index} on {source.host} is gone: its connection closed")

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "meet":
            self._meet(0, rest)
            return
        if word == "bye":
            self._tell_all({"bye": True})
            sys.exit(0)
        self._lose(0, f"process 0 on {self.host} stopped: {rest}")

    def _answer(self, member: Lines, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            member.open = False  # somebody else's program
            return
        if "hello" in message:
            self._welcome(member, **message["hello"])
        elif "died" in message:
            self._lose(member.index, f"process {member.index} on {member.host} was killed or crashed")
        elif "stopped" in message:
            self._lose(member.index, f"process {member.index} on {member.host} stopped: {message['stopped']}")
        elif "meet" in message:
            self._meet(member.index, message["meet"])
        elif "bye" in message:
            member.finished = True

    def _welcome(self, member: Lines, index: int, count: int, host: str) -> None:
        mistake = ""
        if count != self.options.count:
            mistake = (
                f"process {index} on {host} was started as one of {count} processes, process 0 on {self.host} as one "
                f"of {self.options.count}: give all the same number"
            )
        elif index in self.members:
            mistake = (
                f"two processes have the number {index}, on {self.members[index].host} and on {host}: give each its own"
            )
        if mistake:
            member.send({"end": mistake})
            self._end_all(mistake)
        member.index, member.host = index, host
        self.members[index] = member

    def _meet(self, index: int, name: str) -> None:
        here = self.meetings.setdefault(name, set())
        here.add(index)
        if len(here) == self.options.count:
            del self.meetings[name]
            self._tell_all({"met": name})
            self.tell_trainer(f"met {name}")

    def _look_around(self) -> None:
        now = time.monotonic()
        if self.trainer_died():
            self._lose(0, f"process 0 on {self.host} was killed or crashed")
        for index, member in self.members.items():
            if not member.finished and now - member.seen > self.options.lost_after:
                self._lose(
                    index, f"process {index} on {member.host} gave no sign of life for {self.options.lost_after:g} s"
                )
        if self.beat_due():
            self._tell_all({"beat": True})

    def _lose(self, index: int, how: str) -> None:
        self.dead.setdefault(index, how)
        self.decide_at = min(self.decide_at, time.monotonic() + SETTLE_SECONDS)

    def _verdict(self) -> str:
        """JAX ends every process whose coordinator, process 0, died: those deaths are no causes."""
        return self.dead[0] if 0 in self.dead else "; ".join(self.dead.values())

    def _missing(self) -> str:
        missing = sorted(set(range(1, self.options.count)) - self.members.keys())
        here = ", ".join(f"{i} ({member.host})" for i, member in sorted(self.members.items()))
        return (
            f"missing after {self.options.start_timeout:g} s: process {', '.join(map(str, missing))} of "
            f"{self.options.count} (numbered from 0); here: 0 ({self.host}){', ' * bool(here)}{here}. Start the "
            "same command on all hosts; a slow start needs a larger --config.hosts.start_timeout"
        )

    def _tell_all(self, message: Message) -> None:
        for member in self.members.values():
            if member.open and not member.finished:
                member.send(message)

    def _end_all(self, reason: str) -> NoReturn:
        self._tell_all({"end": reason})
        self.end(reason)


class Member(Watcher):
    """Of every other process: reports to process 0's watcher."""

    def run(self) -> None:
        """Until the job ends."""
        self.leader = self._connect()
        self.selector.register(self.leader.sock, selectors.EVENT_READ, self.leader)
        hello = {"index": self.options.index, "count": self.options.count, "host": self.host}
        self.leader.send({"hello": hello})
        reported = None  # when this watcher told of its own process's death
        while True:
            for source in self.poll():
                for line in source.read():
                    if source is self.trainer:
                        self._obey(line)
                    else:
                        self._hear(json.loads(line))
                if source is self.trainer and not source.open:
                    self.selector.unregister(source.fd)
            silence = time.monotonic() - self.leader.seen
            where = f"process 0 at {self.options.address}"
            if not self.leader.open:
                self.end(f"{where} is gone: its connection closed")
            if silence > self.options.lost_after:
                self.end(f"{where} gave no sign of life for {self.options.lost_after:g} s")
            if reported is None and self.trainer_died():
                self.leader.send({"died": True})
                reported = time.monotonic()
            if reported is not None and time.monotonic() > reported + END_SECONDS:
                sys.exit(0)
            if self.beat_due():
                self.leader.send({"beat": True})

    def _connect(self) -> Lines:
        host, port, options = self.options.address.rsplit(":", 1)[0], self.options.port, self.options
        deadline = time.monotonic() + options.start_timeout
        while True:
            try:
                sock = socket.create_connection((host.strip("[]"), port), timeout=END_SECONDS)
                return Lines(sock.fileno(), sock)
            except OSError as error:
                last = error
            if self.trainer_died():
                sys.exit(0)
            if time.monotonic() > deadline:
                self.end(
                    f"missing after {options.start_timeout:g} s: process 0 of {options.count} does not answer at "
                    f"{host}, port {port} ({last}). Start the same command there, and open that port (it is "
                    "--config.hosts.port) and the coordinator's between the hosts"
                )
            time.sleep(POLL_SECONDS)

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        self.leader.send({"bye": True} if word == "bye" else {word: rest})
        if word == "bye":
            sys.exit(0)

    def _hear(self, message: Message) -> None:
        if "ready" in message:
            self.tell_trainer("ready")
        elif "met" in message:
            self.tell_trainer(f"met {message['met']}")
        elif "end" in message:
            self.end(message["end"])
        elif "bye" in message:
            sys.exit(0)


def main() -> None:
    """Runs the watcher of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("index", "count", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", required=True, help="HOST:PORT of the coordinator")
    for name in ("start-timeout", "lost-after"):
        parser.add_argument(f"--{name}", type=float, required=True)
    options = parser.parse_args()
    # They also go to the training process, which then saves; its watcher stays until it has ended.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    (Leader if options.index == 0 else Member)(options).run()


if __name__ == "__main__":
    main()
