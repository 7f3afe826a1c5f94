"""What clients, networks and machines do to a server, and the tests that do it: the data behind README.md of this folder.

python -m tests.faults.catalogue --write      writes the table
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Faults

What is done to a real server in a process of its own, and the tests that do it. After each of them: every block is free, no
task and no descriptor is left, what others are given is unchanged, and the next request is served. `make soak` does most of it
at once, at random, for ten minutes. Written by `python -m tests.faults.catalogue --write`; a test compares it with the list.

| | fault | here | test |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Fault:
    """``tests`` are pytest's node ids under tests/runtime/."""

    kind: str
    what: str
    here: str
    tests: tuple[str, ...]


BODY, NETWORK, PROCESS, LOAD, ALONE, FUZZ = (
    f"test_server_{name}.py::" for name in ("bodies", "network", "process", "resources", "one_request", "fuzz")
)
BODIES = f"{BODY}test_bodies_of_every_kind"
FORMS = "test_server.py::test_a_bad_form_is_that_requests_400"
GATE = f"{BODY}test_what_the_gate_refuses"
LIMITS = f"{PROCESS}test_the_key_the_wait_and_the_end_have_their_limits"

FAULTS = (
    Fault("process", "kill -9 in the middle of a stream", "the client sees a broken stream; the port can be used again", (
        f"{LOAD}test_after_kill_minus_nine_streams_are_broken_and_descriptors_may_be_few",
        f"{PROCESS}test_after_kill_minus_nine_the_port_is_free_and_a_signal_lets_answers_end",
    )),
    Fault("process", "SIGTERM with three streams", "new work 503, the streams end whole, exit 0", (
        f"{PROCESS}test_after_kill_minus_nine_the_port_is_free_and_a_signal_lets_answers_end",
    )),
    Fault("process", "SIGTERM with a stream that does not end in time", "its last event is an error, exit 0", (LIMITS,)),
    Fault("process", "SIGSTOP and SIGCONT, for longer than the watchdog waits", "it goes on where it was", (
        f"{LOAD}test_a_stopped_process_goes_on_where_it_was",
    )),
    Fault("process", "the engine's thread hangs", "/health 503, then exit 70", (
        f"{PROCESS}test_a_hanging_forward_pass_is_unhealthy_and_then_ends_the_process",
    )),
    Fault("process", "the engine's thread dies", "every stream ends with an error, who waits is told, exit 70", (
        f"{PROCESS}test_a_failed_forward_pass_ends_every_stream_and_the_process",
        f"{PROCESS}test_whoever_waits_for_an_engine_that_dies_is_told",
    )),
    Fault("process", "a model that cannot be loaded", "/health 503, exit 1, one sentence", (
        f"{PROCESS}test_loading_is_not_healthy_and_a_bad_model_ends_the_process",
    )),
    Fault("process", "no memory for one request, in the queue, its grammar or its tokens", "500, and nobody else's", (
        f"{ALONE}test_it_fails_alone",
    )),
    Fault("process", "NaN logits or an exception, of one request", "that request ends with an error", (
        f"{ALONE}test_it_fails_alone",
    )),
    Fault("network", "a client that never reads", "little is kept for it; dropped after a minute without progress", (
        f"{LOAD}test_who_never_reads_holds_little_and_not_for_ever",
    )),
    Fault("network", "a client that reads slowly", "gets everything, delays nobody", (
        f"{LOAD}test_who_reads_slowly_but_steadily_is_not_dropped",
        f"{NETWORK}test_a_slow_reader_delays_nobody_and_still_gets_everything",
    )),
    Fault("network", "headers that come slowly or never", "closed after 30 s, whatever trickles in", (
        f"{NETWORK}test_headers_that_do_not_come_are_not_waited_for",
    )),
    Fault("network", "more idle connections than descriptors", "the longest idle make room; all at work: 503", (
        f"{LOAD}test_after_kill_minus_nine_streams_are_broken_and_descriptors_may_be_few",
        f"{NETWORK}test_many_idle_connections_and_bad_ones_leave_no_descriptor",
    )),
    Fault("network", "no descriptor left at all", "one line in the log, and it goes on", (
        f"{LOAD}test_without_a_descriptor_it_says_so_and_goes_on",
    )),
    Fault("network", "disconnect before the first token, in the middle, not streamed", "blocks free within a step", (
        f"{NETWORK}test_a_client_that_leaves_frees_its_blocks_at_once",
        f"{NETWORK}test_leaving_takes_effect_within_a_few_steps",
        "test_server_clients.py::test_a_cancelled_task_frees_its_blocks",
    )),
    Fault("network", "disconnect in the queue", "the others' answers are unchanged", (
        f"{NETWORK}test_clients_that_leave_the_queue_disturb_nobody",
    )),
    Fault("network", "half-close", "taken as leaving", (
        f"{NETWORK}test_a_client_that_only_closes_its_sending_half_has_left",
    )),
    Fault("network", "pipelined requests", "both answered, in order", (
        f"{NETWORK}test_two_requests_in_one_packet_are_both_answered",
    )),
    Fault("network", "a body without an end, half a request", "closed; nothing is held", (
        f"{NETWORK}test_half_requests_and_idle_connections",
    )),
    Fault("network", "many large bodies at once", "503 for those beyond 32 times --max-body-bytes", (
        f"{BODY}test_bodies_together_have_a_limit",
    )),
    Fault("network", "all of this beside a stream", "the stream is what it is alone", (
        f"{NETWORK}test_whoever_is_served_beside_all_this_notices_nothing",
    )),
    Fault("network", "compressed bodies", "415, never unpacked", (GATE,)),
    Fault("network", "a refusal while the body is still being sent", "the client gets the reason, not a reset", (
        f"{BODY}test_a_refusal_reaches_who_is_still_sending",
    )),
    Fault("network", "what is no HTTP", "400 in JSON", (
        f"{NETWORK}test_what_is_no_http_is_answered_like_everything_else",
    )),
    Fault("network", "more requests than the queue takes, or a long wait in it", "429 with Retry-After", (
        f"{NETWORK}test_too_many_are_told_to_come_later", LIMITS,
    )),
    Fault("request", "malformed, deeply nested, NaN and Infinity, integers of 5000 digits", "400; of repeated keys the last", (
        BODIES, f"{FUZZ}test_bytes_that_are_no_body",
    )),
    Fault("request", "fields of every wrong kind and size (n, max_tokens, logit_bias, stop, ids)", "400 naming the field", (
        BODIES, f"{FUZZ}test_bodies_around_the_fields", f"{FUZZ}test_the_schema_says_what_happens",
    )),
    Fault("request", "empty prompts, only special tokens, 10 MB, ids out of the vocabulary", "answered or 400", (BODIES, GATE)),
    Fault("request", "lone surrogates, invalid UTF-8, NUL", "answered or 400", (BODIES,)),
    Fault("request", "control characters for the log", "escaped", (
        f"{BODY}test_a_request_cannot_forge_a_line_of_the_log",
    )),
    Fault("request", "large, recursive or wrong schemas, catastrophic expressions", "400, or served", (
        BODIES, FORMS, f"{BODY}test_a_grammar_that_fails_on_the_way_is_that_requests_400",
    )),
    Fault("request", "templates that do not end or reach for Python", "400 in time", (
        "test_server_template.py::test_a_template_that_does_not_end_is_stopped",
        "test_server_template.py::test_what_a_template_may_not_do_is_that_requests_fault",
    )),
    Fault("request", "stops over several tokens, stops that begin others, characters over several tokens", (
        "streamed is what is not streamed"
    ), (
        "test_server.py::test_streamed_is_what_is_not_streamed",
        "test_detokenize.py::test_no_part_of_a_stop_string_is_ever_shown",
        "test_detokenize.py::test_a_character_cut_off_at_the_end_is_flushed_as_decode_gives_it",
    )),
    Fault("request", "the same seed, or the same id, in mixed batches", "the same answer, twice", (
        "test_server_clients.py::test_many_at_once_get_what_each_gets_alone",
        f"{NETWORK}test_two_requests_of_one_name_are_two",
    )),
    Fault("request", "no key, a wrong one, an extra-long one", "401 on every route but /health", (LIMITS,)),
    Fault("request", "a Host that is not this one, URLs to fetch, templates and code", "403, 400; nothing is fetched", (
        GATE, f"{BODY}test_messages_of_every_kind",
    )),
)  # fmt: skip


def table() -> str:
    """All of them as Markdown."""
    return HEAD + "".join(
        f"| {fault.kind} | {fault.what} | {fault.here} | {', '.join(f'`{test}`' for test in fault.tests)} |\n"
        for fault in FAULTS
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    (HERE / "README.md").write_text(table())
