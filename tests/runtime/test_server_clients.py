"""The official client's own conveniences against a real server: asynchronous calls, parsed answers, streamed events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.runtime.served import Served

MESSAGES: list[Any] = [{"role": "user", "content": "import os"}]
TEMPLATE = """{% for tool in tools or [] %}tool {{ tool.function.name }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}"""


class Thing(BaseModel):
    # llguidance's own option: a model as small as this one would write spaces between two tokens of JSON for ever.
    model_config = ConfigDict(extra="forbid", json_schema_extra={"x-guidance": {"whitespace_flexible": False}})

    colour: Literal["red", "green"]
    size: Literal[1, 2, 3]
    parts: list[Literal["left", "right"]] = Field(max_length=2)


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


TOOL = openai.pydantic_function_tool(Weather)
NAMED: Any = {"type": "function", "function": {"name": "Weather"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template = Path(tmp_path_factory.mktemp("template")) / "tools.jinja"
    template.write_text(TEMPLATE)
    with Served("--chat-template", str(template)) as served:
        yield served
        served.until_idle()
        assert served.stop() == 0


def with_client(server: Served, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    """What ``use`` returns, called with an asynchronous client on an event loop of its own."""

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await use(client)

    return asyncio.run(run())


def test_many_at_once_get_what_each_gets_alone(server: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        async def ask(number: int) -> str:
            done = await client.completions.create(
                model="demo", prompt=f"x{number} = ", max_tokens=12, temperature=1.0, seed=number
            )
            return done.choices[0].text

        async def streamed(number: int) -> str:
            chunks = await client.completions.create(
                model="demo", prompt=f"x{number} = ", max_tokens=12, temperature=1.0, seed=number, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        alone = [await ask(number) for number in range(6)]
        together = await asyncio.gather(*map(ask, range(6)), *map(streamed, range(6)))
        assert len(set(alone)) > 1
        assert together == alone * 2

    with_client(server, use)


def test_a_cancelled_task_frees_its_blocks(server: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        asking = asyncio.create_task(
            client.completions.create(model="demo", prompt="x", max_tokens=900, extra_body={"ignore_eos": True})
        )
        while not await asyncio.to_thread(server.metric, "num_requests_running"):
            assert not asking.done()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    with_client(server, use)
    server.until_idle(seconds=2.0)


def test_answers_are_parsed_into_the_clients_own_classes(server: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        options: dict[str, Any] = {
            "model": "demo", "messages": MESSAGES, "max_tokens": 200, "temperature": 1.0, "seed": 4,
        }  # fmt: skip
        done = await client.chat.completions.parse(response_format=Thing, **options)
        assert isinstance(done.choices[0].message.parsed, Thing)
        async with client.chat.completions.stream(response_format=Thing, **options) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        assert {"content.delta", "content.done", "chunk"} <= kinds
        assert final.choices[0].message.parsed == done.choices[0].message.parsed

    with_client(server, use)


def test_calls_are_parsed_streamed_or_not(server: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        options: dict[str, Any] = {
            "model": "demo", "messages": MESSAGES, "tools": [TOOL], "tool_choice": NAMED, "max_tokens": 100,
            "temperature": 0,
        }  # fmt: skip
        done = await client.chat.completions.parse(**options)
        [call] = done.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather)
        async with client.chat.completions.stream(**options) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_completion()
        deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        [whole] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        assert len(deltas) > 1, "arguments come as they are written"
        assert whole.parsed_arguments == call.function.parsed_arguments
        assert "".join(event.arguments_delta for event in deltas) == whole.arguments == call.function.arguments
        assert final.choices[0].finish_reason == done.choices[0].finish_reason == "tool_calls"

    with_client(server, use)


def test_log_probabilities_streamed_and_whole_agree_and_their_bytes_make_the_text(server: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        options: dict[str, Any] = {
            "model": "demo", "messages": MESSAGES, "max_tokens": 24, "temperature": 2.0, "seed": 8, "logprobs": True,
            "top_logprobs": 3, "extra_body": {"skip_special_tokens": False},
        }  # fmt: skip
        done = await client.chat.completions.create(**options)
        whole, pieces = done.choices[0].logprobs, []
        async for chunk in await client.chat.completions.create(stream=True, **options):
            found = chunk.choices[0].logprobs
            pieces += (found and found.content) or []
        assert whole is not None
        assert whole.content is not None
        assert [row.token for row in pieces] == [row.token for row in whole.content]
        assert [row.logprob for row in pieces] == pytest.approx([row.logprob for row in whole.content])
        for row in whole.content:
            best = [other.logprob for other in row.top_logprobs]
            assert best == sorted(best, reverse=True)
            assert sum(map(math.exp, best)) <= 1 + 1e-5
        spelled = b"".join(bytes(row.bytes or []) for row in whole.content).decode(errors="replace")
        assert spelled == (done.choices[0].message.content or "")

    with_client(server, use)


def test_the_usage_of_every_piece_for_who_asks(server: Served) -> None:
    options: dict[str, Any] = {
        "model": "demo",
        "prompt": "def main():\n",
        "max_tokens": 20,
        "temperature": 0,
        "stream": True,
    }
    both = {"include_usage": True, "continuous_usage_stats": True}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        chunks = list(client.completions.create(stream_options=both, **options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert counts[-2:] == [20, 20]


def test_an_error_inside_a_stream_is_the_clients_exception(server: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="structured_outputs"):
            await client.chat.completions.create(
                model="demo", messages=MESSAGES, stream=True, extra_body={"structured_outputs": {"regex": "["}}
            )
        raw = await client.chat.completions.with_raw_response.create(
            model="demo", messages=MESSAGES, max_tokens=2, response_format={"type": "json_object"}
        )
        assert raw.parse().choices[0].finish_reason == "length"

    with_client(server, use)
