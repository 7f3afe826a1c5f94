"""A server with small limits, and what has to hold around every fault that is done to it: every block is free, no task and no
descriptor is left, and the next request is answered as before."""

from __future__ import annotations

from collections.abc import Iterator

from tests.runtime.served import GREEDY, Served, until


def small_server() -> Iterator[Served]:
    """For a fixture. Its memory is bounded, and it ends well."""
    with Served("--max-body-bytes", "300000", "--max-running-requests", "4", "--max-queued-requests", "8") as served:
        served.post("/v1/completions", GREEDY)
        before = served.rss_bytes
        yield served
        assert served.rss_bytes < before + 160 * 2**20
        assert served.stop() == 0, served.log


def unharmed(server: Served) -> Iterator[None]:
    """For a fixture around each test."""
    server.until_idle()
    expected, descriptors, tasks = greedy(server), server.descriptors, server.tasks
    yield
    server.until_idle()
    assert greedy(server) == expected
    until(lambda: server.descriptors <= descriptors + 1)
    until(lambda: server.tasks <= tasks)


def greedy(server: Served) -> str:
    return str(server.post("/v1/completions", GREEDY).json()["choices"][0]["text"])
