"""Where ranks meet, kept apart from where the ranks before them met.

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

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

POLL_S = 0.02


def meeting_place(
    rank: int, world_size: int, timeout_minutes: float
) -> tuple[dist.Store, str | None]:
    """A store that this attempt's ranks alone use, and the name of the job, the same in all
    attempts.

    Outside torchrun there are no other attempts and the job is None.
    """
    under_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world_size == 1 and not under_torchrun:
        return dist.HashStore(), None
    store, _, _ = next(
        rendezvous("env://", rank, world_size, timeout=timedelta(minutes=timeout_minutes))
    )
    if not under_torchrun:
        return store, None
    store = dist.PrefixStore("megalora", store)
    # The first attempt's first rank to come names the job; later ones read the name.
    job = store.compare_set("job", "", uuid.uuid4().hex).decode()
    attempt = agree_on_attempt(store, rank, world_size, timeout_minutes * 60)
    return dist.PrefixStore(attempt, store), job


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that all living ranks return and no ranks before them have.

    Every rank says a nonce. Rank 0 publishes the roster of nonces, and again whenever one has
    changed, for it may have read one of a dead rank. A rank acknowledges a roster that has its own
    nonce. Once all have acknowledged the same, rank 0 says that it holds.
    """
    nonce = uuid.uuid4().hex
    store.set(f"nonce/{rank}", nonce)
    deadline = time.monotonic() + timeout_s
    acknowledged = ""
    published = ""
    while time.monotonic() < deadline:
        if rank == 0:
            published = _publish(store, world_size, published)
        if store.check(["roster"]):
            roster = json.loads(store.get("roster"))
            name = _name(roster)
            if len(roster) == world_size and roster[rank] == nonce:
                if acknowledged != name:
                    store.set(f"heard/{rank}", name)
                    acknowledged = name
                if store.check(["holds"]) and store.get("holds").decode() == name:
                    return name
        time.sleep(POLL_S)
    missing = [r for r in range(world_size) if not store.check([f"nonce/{r}"])]
    who = (
        f"ranks {missing[:8]} have not come"
        if missing
        else "some ranks belong to an attempt that has ended"
    )
    raise RuntimeError(f"Timed out waiting for all {world_size} ranks to meet: {who}")


def _publish(store: dist.Store, world_size: int, published: str) -> str:
    """Rank 0's part, repeated: publish the roster if it has changed, say that it holds when all
    have acknowledged it."""
    ranks = range(world_size)
    keys = [f"nonce/{r}" for r in ranks]
    if not store.check(keys):
        return published
    roster = [nonce.decode() for nonce in store.multi_get(keys)]
    name = _name(roster)
    if name != published:
        store.set("roster", json.dumps(roster))
    heard = [f"heard/{r}" for r in ranks]
    if store.check(heard) and all(said.decode() == name for said in store.multi_get(heard)):
        store.set("holds", name)
    return name


def _name(roster: list[str]) -> str:
    return "attempt_" + hashlib.sha256(json.dumps(roster).encode()).hexdigest()[:16]
