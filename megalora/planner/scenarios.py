"""Say between which limits times lie where rates are assumed.

Three quantities are uncertain, and an error in one is an error of all layouts alike: the share of
the arithmetic that is reached, the share of the links, and the host's time. A scenario takes each
of them at its low or at its high limit. So layouts whose ranges overlap can still be told apart:
one that recomputes more is slower in every scenario.

Limits are factors of the rates in ``known_gpus.py``. They rest on one H100:

``COMPUTE``  by rates measured there 80 layouts of Qwen3-30B-A3B and 235B-A22B take 0.87 to 1.34
             times the device's seconds that the table predicts; in the one step that was traced, it
             was 1.34 times.
``HOST``     the table has the 4.4 ms a layer that calibration measured; in a training step a layer
             took 7 ms. The lower limit is a guess at a faster host.
``EXPOSED``  what the host issues behind a wait is hidden as far as the device has as much to do, or
             not at all. Not measured.
``LINKS``    not measured: from half of the table's rates to the peaks of data sheets.
"""

from dataclasses import replace
from functools import cache
from itertools import product

from megalora.planner.hardware import (
    Constant,
    Links,
    Machine,
    MeasuredNetwork,
    Network,
    Rate,
    Roofline,
)

COMPUTE = (0.7, 1.2)
"""FLOP/s of products and attention, bytes/s of memory."""
LINKS = (0.5, 1.2)
"""Bytes/s of links, and the inverse of their latencies."""
HOST = (0.5, 1.6)
"""Seconds of the host."""
EXPOSED = (0.0, 1.0)
"""Share of the host's time behind waits that is not hidden: low with ``HOST``, and high with it."""


@cache
def scenarios(machine: Machine) -> list[Machine]:
    """The machine in every combination of limits of what is assumed; empty where nothing is."""
    # Every kind of assumption doubles the list: at most eight machines.
    found = [machine]
    if isinstance(machine.gemm, Roofline | Constant):
        found = [_with_compute(m, factor) for m, factor in product(found, COMPUTE)]
    if _assumed_links(machine.network):
        found = [_with_links(m, factor) for m, factor in product(found, LINKS)]
    if machine.overhead.basis == "assumed":
        hosts = zip(HOST, EXPOSED, strict=True)
        found = [_with_host(m, *limits) for m, limits in product(found, hosts)]
    return found if len(found) > 1 else []


def _with_compute(machine: Machine, factor: float) -> Machine:
    return replace(
        machine,
        gemm=_scaled_rate(machine.gemm, factor),
        grouped_gemm=_scaled_rate(machine.grouped_gemm, factor),
        attention=_scaled_rate(machine.attention, factor),
        attention_backward=_scaled_rate(machine.attention_backward, factor),
        memory=_scaled_rate(machine.memory, factor),
    )


def _with_links(machine: Machine, factor: float) -> Machine:
    """The assumed links at another rate; what was measured stays."""
    links = _assumed_links(machine.network)
    assert links is not None
    links = Links(
        # A faster link also answers sooner.
        factor * links.inside_bytes_per_s,
        factor * links.outside_bytes_per_s,
        links.inside_latency_s / factor,
        links.outside_latency_s / factor,
    )
    network: Network = links
    if isinstance(machine.network, MeasuredNetwork):
        # Groups that were measured keep their times; only those beyond them move.
        network = replace(machine.network, beyond=links)
    return replace(machine, network=network)


def _with_host(machine: Machine, factor: float, exposed: float) -> Machine:
    over = machine.overhead
    over = replace(
        over,
        layer_forward_s=factor * over.layer_forward_s,
        layer_backward_s=factor * over.layer_backward_s,
        step_s=factor * over.step_s,
        exposed=exposed,
    )
    return replace(machine, overhead=over)


def _scaled_rate(rate: Rate, factor: float) -> Rate:
    if isinstance(rate, Constant):
        return Constant(factor * rate.value)
    if isinstance(rate, Roofline):
        return Roofline(factor * rate.flops_per_s, factor * rate.bytes_per_s)
    return rate  # measured


def _assumed_links(network: Network | None) -> Links | None:
    """The links that are assumed: all, or those that answer for groups nobody measured."""
    if isinstance(network, MeasuredNetwork):
        network = network.beyond
    return network if isinstance(network, Links) else None
