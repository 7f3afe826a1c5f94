"""How the process starts, hangs, fails and ends, and what whoever waits is told."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import httpx

from tests.runtime.served import GREEDY, LONG, Served, events, post_bytes, raw, read_stream


def test_the_key_the_wait_and_the_end_have_their_limits(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("first key\nsecond\n")
    flags = ("--queue-timeout", "0.1", "--max-running-requests", "1", "--shutdown-timeout", "0.1")
    with Served("--api-key-file", str(file), *flags) as server:
        headers = {"authorization": "Bearer first key"}
        routes = server.get("/openapi.json", headers=headers).json()["paths"]
        assert {"/v1/chat/completions", "/generate", "/metrics", "/ping", "/flush_cache"} <= set(routes)
        paths = {*routes, "/openapi.json", "/docs", "/v1/embeddings", "/nowhere", "//health", "/health/"} - {"/health"}
        wrong = ("Bearer wrong", "Bearer " + "x" * 20_000, "Bearer", "Basic first key", "Bearer first")
        with httpx.Client(base_url=server.url) as client:
            for method in ("GET", "POST"):
                assert {client.request(method, path).status_code for path in paths} == {401}
            assert {client.get("/metrics", headers={"authorization": key}).status_code for key in wrong} == {401}
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"authorization": "Bearer second"}).status_code == 200
        assert "first key" not in server.log
        # And, as this server runs one request at a time: what waits for too long is sent away.
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=headers) as running:
            pieces = events(running)
            next(pieces)
            waited = server.post("/v1/completions", GREEDY, headers=headers)
            assert waited.status_code == 429
            assert "queue_timeout is 0.1 s" in waited.text
            # And an answer that does not end in time after a signal ends with an error.
            server.process.terminate()
            assert "shutting down" in list(pieces)[-1]["error"]["message"]
        assert server.process.wait(20) == 0, server.log
        assert "Traceback" not in server.log


def test_after_kill_minus_nine_the_port_is_free_and_a_signal_lets_answers_end() -> None:
    with Served(wait=False) as killed:
        killed.stop(number=9)
    with Served("--port", killed.url.rpartition(":")[2]) as server:
        assert server.url == killed.url
        streams: list[list[dict[str, Any]]] = [[], [], []]
        threads = [read_stream(server, {**LONG, "max_tokens": 120}, into) for into in streams]
        server.process.terminate()
        while "draining" not in server.log:
            time.sleep(0.01)
        assert server.get("/health").json()["status"] == "draining"
        assert server.post("/v1/completions", GREEDY).status_code == 503
        assert server.process.wait(20) == 0, server.log
        for thread in threads:
            thread.join()
        assert [into[-1]["choices"][0]["finish_reason"] for into in streams] == ["length"] * 3


BROKEN = """
import runtime.runner as r, time
real, calls = r.Runner.run, []
def run(self, plan):
    if len(plan) >= {together}: calls.append(1)
    if len(calls) > 30: {what}
    return real(self, plan)
r.Runner.run = run
"""
"""Steps of at least ``together`` sequences go well 30 times."""


def test_a_failed_forward_pass_ends_every_stream_and_the_process() -> None:
    with Served(faulty=BROKEN.format(together=2, what="raise RuntimeError('the device fell off')")) as server:
        streams: list[list[dict[str, Any]]] = [[], []]
        threads = [read_stream(server, LONG, into) for into in streams]
        for thread in threads:
            thread.join()
        assert all("the device fell off" in into[-1]["error"]["message"] for into in streams)
        assert server.process.wait(20) == 70
        assert "the device fell off" in server.log


def test_a_hanging_forward_pass_is_unhealthy_and_then_ends_the_process() -> None:
    with Served("--watchdog-timeout", "3", faulty=BROKEN.format(together=1, what="time.sleep(60)")) as server:
        connection = raw(server, post_bytes(LONG))
        statuses = []
        while server.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                statuses.append(server.get("/health").json()["status"])
            time.sleep(0.1)
        connection.close()
        assert server.process.wait(20) == 70
        assert "no progress" in server.log
        assert (statuses[0], statuses[-1]) == ("ok", "stuck")


def test_loading_is_not_healthy_and_a_bad_model_ends_the_process(tmp_path: Any) -> None:
    slow = (
        "import runtime.worker as w, time\nreal = w.Engine\nw.Engine = lambda config: time.sleep(1.5) or real(config)"
    )
    with Served("--kernel", "nonsense", wait=False, faulty=slow) as server:
        answer = server.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        assert server.post("/v1/completions", GREEDY).status_code == 503
        assert server.process.wait(30) == 1
        assert "nonsense" in server.log
        assert "Traceback" not in server.log


def test_whoever_waits_for_an_engine_that_dies_is_told() -> None:
    slow_death = "(time.sleep(1.5), (_ for _ in ()).throw(RuntimeError('the device fell off')))"
    with Served(faulty=BROKEN.format(together=1, what=slow_death)) as server:
        answers: list[httpx.Response] = []
        connection = raw(server, post_bytes(LONG))
        while b"data: " not in connection.recv(4096):
            pass
        time.sleep(0.5)  # the thread hangs by now
        waiting = threading.Thread(target=lambda: answers.append(server.post("/flush_cache", {})))
        waiting.start()
        waiting.join(15)
        connection.close()
        assert [answer.status_code for answer in answers] == [503]
        assert "the device fell off" in answers[0].text
        assert server.process.wait(20) == 70
