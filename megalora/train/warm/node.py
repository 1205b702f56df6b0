"""Start a node's ranks together with those of other nodes, and again when a rank or a node is lost.

What one parent does for its ranks (``parent.py``), the parents of all nodes do together: they meet
(``meeting.py``), are told the step to go on from, fetch the snapshots that they do not hold
(``keeper.py``), fork, and watch both their ranks and the meeting. Still no thread in this process:

    meeting   on the node whose address it has: who trains, from which step
    keeper    hands out snapshots, takes the replicas of the node before
    fetcher   at the beginning of an attempt
    sender    during one: replicas to the next node
"""

import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path
from signal import SIGTERM
from typing import Any

from megalora.train.warm import memory
from megalora.train.warm.keeper import Address, Attempt, Keeper, fetch
from megalora.train.warm.link import Link, connected_within
from megalora.train.warm.meeting import hold_meeting, say
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.parent import Parent, Work, exit_code, fork_ranks, what_failed
from megalora.train.warm.processes import (
    GRACE_S,
    Children,
    check_may_fork,
    fork_helper,
    readable,
)
from megalora.train.warm.restore import InMemory, as_checkpoint
from megalora.train.warm.rounds import SLOTS, Outbox, Sender
from megalora.train.warm.together import Together
from megalora.user_error import LOST_PEER
from megalora.wording import printable

LEAVING_S = 30.0
"""Seconds that the host of the meeting waits for all others to leave it."""
LOOK_S = 0.2
"""Between two looks whether this process was told to stop."""


class MeetingLost(Exception):
    """The meeting no longer answers."""


class NodeParent(Parent):
    """Forks the ranks of one of several nodes."""

    def __init__(
        self, work: Work, num_ranks: int, max_restarts: int, together: Together
    ) -> None:  # fmt: skip
        super().__init__(work, num_ranks, max_restarts)
        self.together = together
        self.world = together.num_nodes * num_ranks
        self.name = os.environ.get("LOCAL_ADDR") or socket.gethostname()
        self.place = -1
        """Number of this node; -1 while it is a spare."""
        self.attempt = Attempt()
        self.replicas = SnapshotMemory([])
        """Snapshots of the ranks of the node before."""
        self._helpers: dict[str, int] = {}
        self._keeper_port = 0
        self._link: Link | None = None

    def run(self) -> int:
        """Train together with the other nodes; returns the exit code of the launcher.

        Raises:
            ValueError: the meeting is not found, or is not for this node.
        """
        _open_many_files()
        together = self.together
        with self._passing_signals():
            meeting = hold_meeting(together, self.num_ranks, self.max_restarts)
            try:
                self._link = connected_within(
                    together.host, together.port, together.token, together.wait_s,
                    stopped=lambda: bool(self._stopped_by),
                )  # fmt: skip
                if self._link is None:
                    return 128 + self._stopped_by
                # Behind all imports: a spare is ready the moment that it is needed.
                self._tell(kind="join", name=self.name, started=together.started)
                code = self._take_part()
                # Also for those that were forked from here and live a little longer.
                self._link.close()
                # It ends when all nodes have left; with this process it would end at once.
                if meeting.alive:
                    meeting.wait(LEAVING_S)
                return 128 + self._stopped_by if self._stopped_by else code
            except MeetingLost as error:
                say(
                    f"the meeting at {together.host}:{together.port} is lost ({error}), and with it"
                    " what nodes agree by. Start again on every node; with checkpoint.resume=true"
                    " the run goes on from the last checkpoint on disk"
                )
                return LOST_PEER
            finally:
                Children(self._helpers).end(0)
                meeting.end(0)

    def _take_part(self) -> int:
        """Do what the meeting says until the run is over; returns its exit code."""
        message: dict[str, Any] | None = None
        while True:
            # The end of an attempt may have brought the next one already.
            message = message or self._next()
            if message is None:
                return 128 + self._stopped_by
            kind = message["kind"]
            if kind == "over":
                if message["why"]:
                    say(printable(message["why"]))
                return int(message["code"])
            if kind == "wait":
                say(f"{self.together.num_nodes} nodes are there; this one waits as a spare")
            if kind == "place":
                self._take_place(message["place"], message["job"])
            if kind in ("place", "stop"):
                # The ranks have said where they stopped.
                if self._stopped_by:
                    return 128 + self._stopped_by
                self._tell_ready()
            message = self._attempt_together(message) if kind == "begin" else None

    def _take_place(self, place: int, job: str) -> None:
        """Become node number ``place``: make its memory, and serve it to the others."""
        say(f"this is node {place} of {self.together.num_nodes}, with {self.num_ranks} ranks")
        self.place = place
        self.job = job
        # The last node sends to the first.
        before = (place - 1) % self.together.num_nodes
        slots = SLOTS if self.together.replicate else memory.SLOTS
        self.memory = SnapshotMemory(self._ranks_of(place), slots)
        self.replicas = SnapshotMemory(self._ranks_of(before))
        assert self._link is not None
        # Where the others can reach it: on the network by which this node reaches the meeting.
        with socket.create_server((self._link.own_host, 0)) as listener:
            self._keeper_port = listener.getsockname()[1]
            keeper = Keeper(
                listener, self.together.token, job, self.attempt, self.memory, self.replicas
            )
            self._helpers["keeper"] = fork_helper(keeper.serve, "keeper")

    def _ranks_of(self, place: int) -> range:
        return range(place * self.num_ranks, (place + 1) * self.num_ranks)

    def _tell_ready(self) -> None:
        holds: dict[int, list[int]] = {}
        for held in (self.memory, self.replicas):
            for rank in held.ranks:
                holds[rank] = sorted(held.steps(rank))
        assert self._link is not None
        host = self._link.own_host
        self._tell(kind="ready", holds=holds, host=host, port=self._keeper_port)

    def _attempt_together(self, begun: dict[str, Any]) -> dict[str, Any] | None:
        """Let this node's ranks train until all have ended, and tell the meeting how; returns what
        the meeting says meanwhile, which ends them, too."""
        check_may_fork()
        self._say_how_it_begins(begun)
        # What other nodes still send of the attempt before is refused from here on.
        self.attempt.number = begun["attempt"]
        step = begun["step"]
        for held in (self.memory, self.replicas):
            held.forget_but(step)
        fetched = SnapshotMemory(self._ranks_elsewhere(), 1)
        outbox = Outbox(self.memory.ranks)
        shown = Path(tempfile.mkdtemp(prefix="megalora-snapshots-"))
        helpers: dict[str, int] = {}
        try:
            newest = None
            if step is not None:
                memories = self._memories(fetched)
                if fault := self._fetch(begun, memories):
                    self._tell_failed(begun, fault, LOST_PEER)
                    return None
                newest = as_checkpoint(memories, step, self.world, shown)
            # Anew for each attempt: the neighbour may be another host now.
            if self.together.replicate:
                helpers["sender"] = self._fork_sender(begun, outbox)
            sent = outbox if self.together.replicate else None
            given = InMemory(self.memory, newest, step, sent, fetched)
            ranks = self._fork_ranks_together(given, begun)
            message = self._attend_together(ranks)
            if message is None:
                self._tell_how_it_ended(begun, ranks)
            return message
        finally:
            Children(helpers).end(0)
            outbox.close()
            # Once more, where it did not come to ranks.
            fetched.close()
            shutil.rmtree(shown)

    def _ranks_elsewhere(self) -> list[int]:
        here = {*self.memory.ranks, *self.replicas.ranks}
        return [rank for rank in range(self.world) if rank not in here]

    def _memories(self, fetched: SnapshotMemory) -> dict[int, SnapshotMemory]:
        """Where this node has each rank's snapshot to go on from. Those of its own ranks and of the
        node before stay there, so that each is on two nodes at least when the attempt begins."""
        memories: dict[int, SnapshotMemory] = {}
        # Where two nodes are one, such as in a test, own ranks are last.
        for held in (fetched, self.replicas, self.memory):
            for rank in held.ranks:
                memories[rank] = held
        return memories

    def _fetch(self, begun: dict[str, Any], memories: dict[int, SnapshotMemory]) -> str:
        """Get what is missing here from the nodes that have it; returns what is wrong, if
        anything."""
        step = begun["step"]
        wanted: list[tuple[int, Address]] = []
        for rank, held in memories.items():
            if step not in held.steps(rank):
                holders = begun["holders"][str(rank)]
                # Not all from the same one.
                wanted.append((rank, self._address(begun, holders[self.place % len(holders)])))
        # Often: after the loss of a rank each of two nodes has all.
        if not wanted:
            return ""

        def work() -> None:
            try:
                fetch(wanted, step, memories)
            except (OSError, ValueError) as error:
                say(f"cannot fetch a snapshot: {error}")
                raise SystemExit(1) from None

        fetcher = Children({"fetcher": fork_helper(work, "fetcher")})
        while fetcher.alive:
            fetcher.wait(60.0)
        if fetcher.codes["fetcher"] == 0:
            return ""
        return f"{self.name} cannot fetch the snapshots of step {step}"

    def _address(self, begun: dict[str, Any], place: int) -> Address:
        host, port = begun["nodes"][place]
        return Address(host, port, self.together.token, self.job)

    def _fork_sender(self, begun: dict[str, Any], outbox: Outbox) -> int:
        neighbour = self._address(begun, (self.place + 1) % self.together.num_nodes)
        sender = Sender(outbox, self.memory, neighbour, begun["attempt"], say)
        return fork_helper(sender.serve, "sender")

    def _fork_ranks_together(self, given: InMemory, begun: dict[str, Any]) -> Children:
        host, port = begun["store"]
        pids = fork_ranks(
            self.work, given, self.num_ranks, (host, port), self.place, self.together.num_nodes
        )
        # They have it open by themselves, until they have read it.
        assert given.fetched is not None
        given.fetched.close()
        self._ranks = Children(pids)
        # Told while they were forked: the handler did not know them yet.
        if self._stopped_by:
            self._ranks.signal(SIGTERM)
        return self._ranks

    def _attend_together(self, ranks: Children) -> dict[str, Any] | None:
        """Wait until all ranks have ended; when one fails, or the meeting says so, the others are
        ended, too. Returns what the meeting has said."""
        assert self._link is not None
        try:
            while ranks.alive:
                waited = [*ranks.descriptors(), self._link.fileno()]
                if self._link.fileno() in readable(waited, 60.0):
                    message = self._receive()
                    ranks.end(GRACE_S)
                    return message
                if any(ranks.codes[name] for name in ranks.reap()):
                    # They may be waiting for it, without end.
                    ranks.end(GRACE_S)
        except MeetingLost:
            ranks.end(GRACE_S)
            raise
        return None

    def _tell_how_it_ended(self, begun: dict[str, Any], ranks: Children) -> None:
        code = exit_code(ranks)
        if code == 0:
            self._tell(kind="finished", attempt=begun["attempt"])
        else:
            self._tell_failed(begun, f"{what_failed(ranks)} on {self.name}", code)

    def _tell_failed(self, begun: dict[str, Any], why: str, code: int) -> None:
        self._tell(kind="failed", attempt=begun["attempt"], why=why, code=code)

    def _say_how_it_begins(self, begun: dict[str, Any]) -> None:
        attempt, step = begun["attempt"], begun["step"]
        # Said where this node has taken its place.
        if attempt == 0:
            return
        where = "the last checkpoint on disk" if step is None else f"step {step} in memory"
        say(
            f"{printable(begun['why'])}; starting all ranks again ({attempt} of"
            f" {self.max_restarts}) from {where}"
        )

    def _next(self) -> dict[str, Any] | None:
        """What the meeting says next; None where this process is told to stop before."""
        assert self._link is not None
        while not self._link.wait(LOOK_S):
            if self._stopped_by:
                return None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._link is not None
        try:
            return self._link.receive()
        except OSError as error:
            raise MeetingLost(str(error)) from None

    def _tell(self, **message: Any) -> None:
        assert self._link is not None
        try:
            self._link.send(**message)
        except OSError as error:
            raise MeetingLost(str(error)) from None


def _open_many_files() -> None:
    """Let this process open as many files as it may: each snapshot has two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
