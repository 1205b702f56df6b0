"""Let the ranks of one attempt of a job meet, apart from those of attempts before it.

torchrun gives every attempt of a job (``--max-restarts``) the same store, with the addresses of
dead ranks still in it: a rank that starts early reads one and fails to connect. The attempt's
number cannot tell attempts apart, because each node counts its own failures only. So ranks agree on
a name that contains a number that each has drawn anew.
"""

import hashlib
import json
import os
import time
import uuid
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megalora.json_text import parse_json

POLL_S = 0.02
"""Seconds between two looks into the store."""


class Met(NamedTuple):
    """What the ranks of an attempt have in common."""

    store: dist.Store
    """A store that only they use."""
    job: str | None
    """Name of the job, the same in all its attempts; None outside torchrun, where there are no
    others."""


def meeting_place(rank: int, world_size: int, timeout_minutes: float) -> Met:
    """Meet the other ranks of this attempt."""
    under_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # One process alone needs no address, and so no free port.
    if world_size == 1 and not under_torchrun:
        return Met(dist.HashStore(), None)
    timeout = timedelta(minutes=timeout_minutes)
    # A generator that yields again only for back ends that meet again, which env:// is not.
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    if not under_torchrun:
        return Met(store, None)
    store = dist.PrefixStore("megalora", store)
    # The first attempt's first rank to come names the job; later ones read the name.
    job = store.compare_set("job", "", uuid.uuid4().hex).decode()
    attempt = agree_on_attempt(store, rank, world_size, timeout_minutes * 60)
    return Met(dist.PrefixStore(attempt, store), job)


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that all living ranks return, and that no ranks before them had.

    Every rank stores a nonce. Rank 0 publishes the roster of nonces, and again whenever one has
    changed, because it may have read one of a dead rank. A rank acknowledges a roster that has its
    own nonce. Once all have acknowledged the same roster, rank 0 declares that it holds.
    """
    nonce = uuid.uuid4().hex
    # Replaces the nonce of the dead rank that had this number.
    store.set(f"nonce/{rank}", nonce)
    deadline = time.monotonic() + timeout_s
    # Names of the last rosters.
    acknowledged = ""
    published = ""
    while time.monotonic() < deadline:
        if rank == 0:
            published = _publish(store, world_size, published)
        if store.check(["roster"]):
            roster = parse_json(store.get("roster"))
            name = _name(roster)
            # Another attempt's roster may still stand there, of another size even.
            if len(roster) == world_size and roster[rank] == nonce:
                if acknowledged != name:
                    store.set(f"heard/{rank}", name)
                    acknowledged = name
                if store.check(["holds"]) and store.get("holds").decode() == name:
                    return name
        time.sleep(POLL_S)
    missing = _who_is_missing(store, world_size)
    raise RuntimeError(f"Timed out waiting for all {world_size} ranks to meet: {missing}")


def _who_is_missing(store: dist.Store, world_size: int) -> str:
    missing = [rank for rank in range(world_size) if not store.check([f"nonce/{rank}"])]
    if missing:
        return f"ranks {missing[:8]} have not come"
    # Every number has been taken, but not by ranks that are alive.
    return "some ranks belong to an attempt that has ended"


def _publish(store: dist.Store, world_size: int, published: str) -> str:
    """Do rank 0's part once: publish the roster if it has changed, and declare that it holds if all
    have acknowledged it.

    Args:
        published: name of the last roster; empty before the first.
    Returns:
        The name of the roster now.
    """
    nonces = _values(store, "nonce", world_size)
    # Somebody has not come yet.
    if nonces is None:
        return published
    name = _name(nonces)
    if name != published:
        store.set("roster", json.dumps(nonces))
    if _values(store, "heard", world_size) == [name] * world_size:
        store.set("holds", name)
    return name


def _values(store: dist.Store, kind: str, world_size: int) -> list[str] | None:
    """What every rank has stored under ``KIND/RANK``; None unless all have."""
    keys = [f"{kind}/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return None
    return [value.decode() for value in store.multi_get(keys)]


def _name(roster: list[str]) -> str:
    """The attempt's name, the same for the same nonces in the same order."""
    return "attempt_" + hashlib.sha256(json.dumps(roster).encode()).hexdigest()[:16]
