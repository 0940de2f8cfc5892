"""How much of everything: in full, or to try the tests out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Attributes:
    num_streams, num_tokens: streams that are disturbed, and how long they are.
    max_storm_s: no new request after so long, however many were sent.
    kill_interval_s: mean, in the storm.
    overload_s: of the real model; paced_overload_s: of the paced one.
    slow_client_s: for so long the slow client reads.
    mesh_s: of load on all pairs of prefill and decode workers; mesh_clients: for each pair.
    every_wake: of what hangs: for good, and until it wakes up after 10 s, and after 90 s.
    soak_kills: kill a worker every minute of the soak.
    num_handovers: requests of the case of that name.
    """

    num_streams: int = 32
    num_tokens: int = 48
    num_storm_requests: int = 500
    max_storm_s: float = 120.0
    kill_interval_s: float = 10.0
    overload_s: float = 30.0
    paced_overload_s: float = 60.0
    slow_client_s: float = 60.0
    soak_minutes: float = 4.0
    mesh_s: float = 60.0
    mesh_clients: int = 16
    every_wake: bool = True
    soak_kills: bool = False
    num_handovers: int = 1000


QUICK = Scale(
    num_streams=8,
    num_tokens=24,
    num_storm_requests=60,
    max_storm_s=60.0,
    overload_s=8.0,
    paced_overload_s=10.0,
    slow_client_s=15.0,
    soak_minutes=1.0,
    mesh_s=10.0,
    mesh_clients=4,
    every_wake=False,
    num_handovers=120,
)
