"""Let the parents of several nodes agree: who trains, from which step, and when all start again.

One process holds the meeting, on the host whose address it has; all parents stay connected to it.

    join      a node comes, with what it was started with; it takes a free place or waits as a spare
    ready     it has no ranks, and says of which ranks it holds which steps
    begin     once every place is taken and ready: the attempt's step, and who holds which rank's
    failed    a rank of a node has ended: everybody ends its ranks and gets ready again
    finished  all ranks of a node have ended well; when they have on all nodes, the run is over

The step is the newest that every rank has somewhere (``newest_common``): in its own node's memory,
or as a replica in that of a neighbour. The ranks' store is here, too: it outlives all ranks.
"""

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megalora.train.warm.link import Link, accepted
from megalora.train.warm.processes import Children, fork_helper, readable
from megalora.train.warm.together import Together
from megalora.user_error import LOST_PEER, MISTAKE
from megalora.wording import printable, shorten

READY_S = 60.0
"""Seconds that a node may take to end its ranks; then it is lost."""
LOOK_S = 0.2
"""Between two looks at the clock."""
GREETED = 32
"""Connections at a time that have not shown the token yet."""

type Holdings = Mapping[int, Sequence[int]]
"""Rank -> steps of which a node has its snapshot."""


def newest_common(holdings: Iterable[Holdings], world: int) -> int | None:
    """The newest step of which each rank has a snapshot on some node; None where there is none."""
    of_rank: list[set[int]] = [set() for _ in range(world)]
    for held in holdings:
        for rank, steps in held.items():
            of_rank[rank].update(steps)
    # The minimum over owners is not enough: each has a few steps, and may lack one between them.
    common = set.intersection(*of_rank)
    return max(common) if common else None


@dataclass(eq=False)
class Node:
    """A node that has joined."""

    link: Link
    name: str
    address: tuple[str, int] = ("", 0)
    """Where its keeper (``keeper.py``) listens."""
    place: int | None = None
    """None: a spare."""
    state: str = "joined"
    """Or ``ready``, ``running``, ``finished``."""
    holds: dict[int, list[int]] = field(default_factory=dict)

    def tell(self, **message: Any) -> None:
        """Send a message. That a node is gone is seen by the thread that listens to it."""
        try:
            self.link.send(**message)
        except OSError:
            self.link.close()


class Meeting:
    """The meeting of one run."""

    def __init__(
        self, listener: socket.socket, token: bytes, num_nodes: int, num_ranks: int,
        max_restarts: int, wait_s: float,
    ) -> None:  # fmt: skip
        """
        Args:
            num_nodes: places; every further node is a spare.
            num_ranks: of each node.
            max_restarts: how often all ranks may start again.
            wait_s: seconds that nodes wait for each other, at the start and for a lost one's place.
        """
        self.listener = listener
        self.token = token
        self.num_ranks = num_ranks
        self.max_restarts = max_restarts
        self.wait_s = wait_s
        self.job = os.urandom(16).hex()
        self.attempt = 0
        self.places: list[Node | None] = [None] * num_nodes
        self.spares: list[Node] = []
        self.why = ""
        """What has ended the last attempt."""
        self.is_over = False
        self._started: dict[str, Any] | None = None
        """What the first node was started with."""
        self._lock = threading.RLock()
        self._since_s = time.monotonic()
        """Since when nodes have been waited for."""
        self._store: Any = None
        self._greeted = threading.Semaphore(GREETED)

    def serve(self) -> None:
        """Until the run is over and all nodes have left."""
        # Whoever has not read yet that the run is over would take this end for a loss.
        while not self.is_over or any(self.places) or self.spares:
            if readable([self.listener.fileno()], LOOK_S):
                self._accept()
            with self._lock:
                self._look_at_clock()

    def _accept(self) -> None:
        """Let a thread find out who has come; nodes that are turned away try again."""
        # It may have gone again.
        with suppress(OSError):
            connection, _ = self.listener.accept()
            if not self._greeted.acquire(blocking=False):
                connection.close()
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            link = accepted(connection, self.token)
            message = link.receive()
        # A stranger, or one who has gone again.
        except OSError as error:
            say(f"a connection from {_peer(connection)} was refused: {error}")
            connection.close()
            return
        finally:
            self._greeted.release()
        node = Node(link, printable(str(message.get("name")))[:80])
        with self._lock:
            self._join(node, message)
        self._listen(node)

    def _join(self, node: Node, message: dict[str, Any]) -> None:
        # Ranks with other options would wait for each other in different collectives.
        started = message.get("started")
        self._started = self._started or started
        if started != self._started:
            difference = _difference(self._started or {}, started)
            node.tell(
                kind="over", code=MISTAKE,
                why=f"this node was started otherwise than the first one: {difference}",
            )  # fmt: skip
            return
        if self.is_over:
            node.tell(kind="over", code=LOST_PEER, why="the run is over")
            return
        # A free place is filled from the spares, of whom this one may be the only one.
        self.spares.append(node)
        self._fill_places()
        if node.place is None:
            node.tell(kind="wait")
            say(f"{node.name} waits as a spare")

    def _fill_places(self) -> None:
        for place, there in enumerate(self.places):
            if there is None and self.spares:
                node = self.spares.pop(0)
                node.place = place
                self.places[place] = node
                node.tell(kind="place", place=place, job=self.job)

    def _listen(self, node: Node) -> None:
        """Take in what a node says, until it is gone."""
        try:
            while True:
                # Without a limit: a host that is gone is noticed by the system's probes.
                node.link.wait()
                message = node.link.receive()
                with self._lock:
                    self._take(node, message)
        # Whatever it is that this node has sent or not: it is lost, and no other one.
        except (OSError, ValueError, KeyError, TypeError) as error:
            with self._lock:
                self._lose(node, str(error))

    def _take(self, node: Node, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ready":
            node.state = "ready"
            node.holds = {int(rank): steps for rank, steps in message["holds"].items()}
            node.address = (message["host"], message["port"])
            self._begin_if_all_are_ready()
        # What a node says of an attempt that has ended is no news.
        elif message["attempt"] != self.attempt or node.state != "running":
            return
        elif kind == "failed":
            self._restart(message["why"], message["code"])
        elif kind == "finished":
            node.state = "finished"
            if all(other and other.state == "finished" for other in self.places):
                self._end(0, "")

    def _begin_if_all_are_ready(self) -> None:
        if self.is_over or not all(node and node.state == "ready" for node in self.places):
            return
        nodes = [node for node in self.places if node]
        step = newest_common([node.holds for node in nodes], len(nodes) * self.num_ranks)
        # Who lacks a snapshot of that step fetches it from one of these.
        holders: dict[int, list[int]] = {}
        for place, node in enumerate(nodes):
            for rank, steps in node.holds.items():
                if step in steps:
                    holders.setdefault(rank, []).append(place)
        host, port = self._open_store()
        self._since_s = time.monotonic()
        # All before the first is told: it may fail before the last one is.
        for node in nodes:
            node.state = "running"
        for node in nodes:
            node.tell(
                kind="begin", attempt=self.attempt, step=step, holders=holders, why=self.why,
                nodes=[other.address for other in nodes], store=[host, port],
            )  # fmt: skip

    def _open_store(self) -> tuple[str, int]:
        """A store for one attempt, which listens where the meeting does and nowhere else."""
        host = self.listener.getsockname()[0]
        # torch itself would listen at all addresses.
        with socket.create_server((host, 0)) as listening:
            port = listening.getsockname()[1]
            # The store closes the one that it is given.
            descriptor = os.dup(listening.fileno())
        self._store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
        )
        dist.PrefixStore("megalora", self._store).set("job", self.job)
        return host, port

    def _restart(self, why: str, code: int) -> None:
        """Let all nodes end their ranks and get ready again, where they may."""
        self.why = why
        # A rank has said it, and would make it again.
        if code == MISTAKE or self.attempt == self.max_restarts:
            self._end(code, why)
            return
        # Reports of the attempt that ends here are no news from now on.
        self.attempt += 1
        self._since_s = time.monotonic()
        for node in self.places:
            if node is not None and node.state in ("running", "finished"):
                node.state = "ending"
                node.tell(kind="stop")

    def _lose(self, node: Node, reason: str) -> None:
        node.link.close()
        # Nobody trains there.
        if node in self.spares:
            self.spares.remove(node)
        if node.place is None or self.places[node.place] is not node:
            return
        self.places[node.place] = None
        # It has left, as all do.
        if self.is_over:
            return
        if node.state in ("running", "finished"):
            self._restart(f"{node.name} is lost ({reason})", LOST_PEER)
        if self.is_over:
            return
        self._fill_places()
        if self.places[node.place] is None:
            say(
                f"place {node.place}, which {node.name} had, is free, and no spare is there: start"
                f" the same command on another node within {self.wait_s:g} s"
            )
            self._since_s = time.monotonic()

    def _look_at_clock(self) -> None:
        """End the run where a place stays free, and lose a node that does not get ready."""
        waited_s = time.monotonic() - self._since_s
        free = [place for place, node in enumerate(self.places) if node is None]
        if self.is_over:
            return
        if free and waited_s > self.wait_s:
            self._end(
                LOST_PEER,
                f"no node came for place {free[0]} within {self.wait_s:g} s. Start again on the"
                " nodes that there are: with checkpoint.resume=true the run goes on from the last"
                " checkpoint on disk, on any number of ranks",
            )
        for node in self.places:
            if node is not None and node.state == "ending" and waited_s > READY_S:
                # Its thread sees that, and takes it for lost.
                node.link.close()

    def _end(self, code: int, why: str) -> None:
        self.is_over = True
        for node in [*self.places, *self.spares]:
            if node is not None:
                node.tell(kind="over", code=code, why=why)


def hold_meeting(together: Together, num_ranks: int, max_restarts: int) -> Children:
    """Fork the meeting's process where its address is this host's and nobody holds it yet; returns
    it, or nothing. Raises ``ValueError`` where nobody can listen there."""
    try:
        listener = socket.create_server((together.host, together.port))
    except OSError as error:
        # Another host's, or one of another process here; a name that is not known yet is looked up
        # again where this node connects.
        elsewhere = error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
        if elsewhere or isinstance(error, socket.gaierror):
            return Children({})
        raise ValueError(
            f"--meet: cannot listen at {together.host}:{together.port} ({error.strerror})"
        ) from None
    meeting = Meeting(
        listener, together.token, together.num_nodes, num_ranks, max_restarts, together.wait_s
    )
    with listener:
        return Children({"meeting": fork_helper(meeting.serve, "meeting")})


def say(text: str) -> None:
    print(f"megalora on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)


def _peer(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return "somebody"


def _difference(first: dict[str, Any], other: Any) -> str:
    if not isinstance(other, dict):
        return "it does not say how"
    for key in sorted({*first, *other}):
        if first.get(key) != other.get(key):
            return f"{key} is {shorten(other.get(key))} here and {shorten(first.get(key))} there"
    return ""
