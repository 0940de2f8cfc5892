"""How long a replica that stops stays open for a proxy that no longer asks it."""

from __future__ import annotations

from pdray.serve.app import DRAIN_VARIABLE, drain_options


def test_behind_haproxy_the_drain_is_short() -> None:
    options = drain_options({"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    assert float(options["runtime_env"]["env_vars"][DRAIN_VARIABLE]) <= 2


def test_a_time_that_is_set_and_other_proxies_are_left_alone() -> None:
    assert drain_options({"RAY_SERVE_ENABLE_HA_PROXY": "1", DRAIN_VARIABLE: "45"}) == {}
    assert drain_options({}) == drain_options({"RAY_SERVE_ENABLE_HA_PROXY": "0"}) == {}


def test_serve_reads_that_variable() -> None:
    from ray.serve._private import constants

    assert hasattr(constants, DRAIN_VARIABLE)
