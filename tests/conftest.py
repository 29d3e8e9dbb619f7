"""What every test stands on: hypothesis profiles, one thread, no network, generators left alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

# Read by huggingface_hub when it is first imported, hence here and not in a fixture.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.register_profile(
    "nightly", deadline=None, max_examples=10_000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Tests run side by side, one a core.
torch.set_num_threads(1)

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse to resolve or connect to any host but this one."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOCAL_HOSTS:
            raise RuntimeError(f"a test must not use the network, and this one asked for {name}")

    def guarded(original: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return original(self, address)

        return call

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        patch.setattr(socket, "getaddrinfo", resolve)
        yield


@pytest.fixture(autouse=True)
def rng_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a test is marked ``rng_untouched``, check that it leaves the global torch generator as it was."""
    before = torch.get_rng_state()
    yield
    if request.node.get_closest_marker("rng_untouched") and not torch.equal(before, torch.get_rng_state()):
        pytest.fail("the global torch generator was drawn from; pass generator= all the way down")


@pytest.fixture
def slow_draws(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let every drawing of random numbers of an evaluation take one second; return the time that it is."""
    from sdeblend.methods import draws

    now, philox = [0.0], draws.philox

    def slow(*given: Any) -> Any:
        now[0] += 1.0
        return philox(*given)

    monkeypatch.setattr(draws, "perf_counter", lambda: now[0])
    monkeypatch.setattr(draws, "philox", slow)
    return now
