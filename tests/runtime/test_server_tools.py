"""Tools and reasoning: what a client demands it gets, what a model writes is read, and nothing of it is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from runtime.checkpoint import locate
from runtime.errors import InvalidRequest, LoadError
from runtime.server.reply import Piece, ReplyFormat
from runtime.server.tools import Tool, ToolUse, with_parsed_arguments
from tests.runtime.served import Served

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
TEMPLATE = """{% if reasoning_effort %}effort {{ reasoning_effort }}
{% endif %}{% macro city(arguments) %}
{% if arguments is string %}{{ raise_exception("text") }}{% endif %}{{ arguments.city }}
{% endmacro %}{% for tool in tools or [] %}tool {{ tool.function.name }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function.name }} {{ city(call.function.arguments) }}
{% endfor %}{% endfor %}"""

USE = ToolUse(tuple(TOOLS))


def named(tools: str | None, reasoning: str | None = None) -> ReplyFormat:
    form = ReplyFormat.of_names(tools, reasoning)
    assert form
    return form


def read(
    form: ReplyFormat, text: str, *, step: int, use: ToolUse = USE, prompt: str = "", separate: bool = True
) -> Piece:
    """The reply in pieces of ``step`` characters."""
    parser, whole = form.parser(use, prompt, separate_reasoning=separate), Piece()
    for start in range(0, len(text), step):
        whole.merge(parser.feed(text[start : start + step], last=False))
    whole.merge(parser.feed("", last=True))
    return whole


def calls(piece: Piece) -> list[tuple[str | None, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in piece.calls]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
CODER = """<tool_call>
<function=weather>
<parameter=city>
Rome
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>"""
MEANT = ("weather", {"city": "Rome", "days": 2})
QWEN_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "prompt", "text"),
    [
        (named("hermes", "qwen3"), "", f"<think>\nI must ask.\n</think>\n\nLook:\n{CALL}"),
        (named("qwen25", "deepseek-r1"), "", f"I must ask.\n</think>\n\nLook:\n{CALL}"),
        (named("qwen3_coder", "qwen3"), "x<think>\n", f"I must ask.\n</think>\n\nLook:\n{CODER}"),
    ],
)
def test_thoughts_answers_and_calls_are_told_apart(form: ReplyFormat, prompt: str, text: str, step: int) -> None:
    reply = read(form, text, step=step, prompt=prompt)
    assert (reply.reasoning, reply.content, calls(reply)) == ("I must ask.", "Look:", [MEANT])


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_a_familys_own_template_is_found(step: int) -> None:
    pytest.importorskip("transformers.cli.serving.utils")
    form = ReplyFormat.of_model(SimpleNamespace(), "qwen3")
    text = f"<think>I must ask.</think>Look:\n{CALL}\n{CALL}<|im_end|>"
    reply = read(form, text, step=step, prompt=QWEN_PROMPT)
    assert (reply.reasoning, reply.content, calls(reply)) == ("I must ask.", "Look:", [MEANT, MEANT])
    together = read(form, text, step=step, prompt=QWEN_PROMPT, separate=False)
    assert together.content == "<think>I must ask.</think>Look:"


def test_a_tokenizers_template_comes_first() -> None:
    fields = {"content": {"content": "text"}, "thinking": {"open": "[[", "close": "]]", "content": "text"}}
    template = {"defaults": {"role": "assistant"}, "start_anchor": "A:", "fields": fields}
    form = ReplyFormat.of_model(SimpleNamespace(response_template=template), "qwen3")
    reply = read(form, "[[hm]]yes", step=1, prompt="U: x A:")
    assert (reply.reasoning, reply.content) == ("hm", "yes")
    assert not form.reads_calls


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize(
    "broken", ["<tool_call>{not json}</tool_call> and on", '<tool_call>{"name": "weather"}</tool_call>']
)
def test_a_call_that_cannot_be_read_is_text(broken: str, step: int) -> None:
    reply = read(named("hermes"), f"Look: {broken}", step=step)
    assert reply.content == f"Look: {broken}"
    assert not reply.calls


def test_one_call_where_only_one_is_wanted() -> None:
    form = named("hermes")
    assert calls(read(form, CALL + CALL, step=3, use=ToolUse(tuple(TOOLS), None, False))) == [MEANT]


def test_without_tools_marks_are_text() -> None:
    assert read(named("hermes"), CALL, step=3, use=ToolUse()).content == CALL


def test_a_cut_off_list_of_calls_is_text() -> None:
    cut = '[{"name": "clock", "argum'
    assert read(ReplyFormat(), cut, step=4, use=ToolUse(tuple(TOOLS), "")) == Piece(content=cut)


def test_parsers_that_are_not_known_end_the_start() -> None:
    with pytest.raises(LoadError, match="--tool-call-parser hermez: no such parser; known: hermes"):
        named("hermez")
    with pytest.raises(LoadError, match="--reasoning-parser o1"):
        named(None, "o1")


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (None, "required", "needs tools"),
        (TOOLS, "always", "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "sun"}}, "not among tools, which are weather, clock"),
        ([CLOCK, CLOCK], None, "given twice"),
    ],
)
def test_choices_that_cannot_be(tools: list[Any] | None, choice: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ToolUse.of(tools and [Tool.model_validate(tool) for tool in tools], choice, True)


def test_one_call_is_demanded_where_only_one_is_wanted() -> None:
    one, many = (ToolUse(tuple(TOOLS), "", parallel).form() for parallel in (False, True))
    assert one
    assert many
    assert one["json"]["maxItems"] == 1
    assert "maxItems" not in many["json"]


def test_arguments_go_back_to_the_template_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    message = with_parsed_arguments({"role": "assistant", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    call["function"] = {"name": "weather", "arguments": "{"}
    with pytest.raises(InvalidRequest, match="not JSON"):
        with_parsed_arguments({"role": "assistant", "tool_calls": [call]})


# With the official client -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template = Path(tmp_path_factory.mktemp("template")) / "tools.jinja"
    template.write_text(TEMPLATE)
    with Served("--chat-template", str(template), "--tool-call-parser", "hermes") as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
            yield made
        served.until_idle()
        assert served.stop() == 0


def ask(client: openai.OpenAI, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Rome?"}]
    return client.chat.completions.create(
        **{"model": "demo", "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 120, **options}
    )


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, list[tuple[str, Any]], str | None]:
    content, found, reason = "", dict[int, list[str]](), None
    for chunk in ask(client, stream=True, **options):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.function.name:
                    assert call.id
                    found[call.index] = [call.function.name, ""]
                found[call.index][1] += call.function.arguments
    return content, [(name, json.loads(arguments)) for name, arguments in found.values()], reason


def unstreamed(client: openai.OpenAI, **options: Any) -> tuple[str, list[tuple[str, Any]], str | None]:
    choice = ask(client, **options).choices[0]
    made = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    return choice.message.content or "", made, choice.finish_reason


def test_a_named_function_is_called_with_arguments_of_its_schema(client: openai.OpenAI) -> None:
    options = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    content, made, reason = unstreamed(client, **options)
    [(name, arguments)] = made
    assert (content, name, reason) == ("", "weather", "tool_calls")
    assert arguments["city"] in ("Rome", "Oslo")
    assert 1 <= arguments["days"] <= 9
    assert streamed(client, **options) == (content, made, reason)


def test_a_required_call_is_one_of_the_tools(client: openai.OpenAI) -> None:
    options = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0, "seed": 3}
    content, made, reason = unstreamed(client, **options)
    assert (content, reason, len(made)) == ("", "tool_calls", 1)
    assert made[0][0] in ("weather", "clock")
    assert streamed(client, **options) == (content, made, reason)


def test_references_within_the_parameters_of_a_tool(client: openai.OpenAI) -> None:
    """As pydantic writes the schema of a model with another one in it, or of one that holds itself."""

    class Place(BaseModel):
        city: Literal["Rome", "Oslo"]
        near: list[Place] = Field(max_length=1)

    class Trip(BaseModel):
        place: Place

    Place.model_rebuild(_types_namespace={"Place": Place})
    tools = [openai.pydantic_function_tool(kind) for kind in (Trip, Place)]
    words = json.loads((Path(locate("demo")) / "tokenizer.json").read_text())["model"]["vocab"]
    ends = {str(token): 100 for word, token in words.items() if "]" in word}  # or places would be near places for ever
    for choice in ("required", {"type": "function", "function": {"name": "Trip"}}):
        _, made, reason = unstreamed(client, tools=tools, tool_choice=choice, logit_bias=ends)
        assert (len(made) >= 1, reason) == (True, "tool_calls")
        for name, arguments in made:
            {"Trip": Trip, "Place": Place}[name].model_validate(arguments)
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"not": deep}
    with pytest.raises(openai.BadRequestError, match=r"^.*(nested too deeply|does not compile)"):
        ask(client, tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}], tool_choice="required")


def test_a_call_of_the_models_own_is_read(client: openai.OpenAI) -> None:
    written = r'So:<tool_call>\{"name": "weather", "arguments": \{"city": "Oslo", "days": [1-9]\}\}</tool_call>'
    options = {"extra_body": {"regex": written}}
    content, made, reason = unstreamed(client, **options)
    assert (content, made[0][0], made[0][1]["city"], reason) == ("So:", "weather", "Oslo", "tool_calls")
    assert streamed(client, **options) == (content, made, reason)


def test_no_call_where_none_may_be(client: openai.OpenAI) -> None:
    content, made, reason = unstreamed(client, tool_choice="none", extra_body={"regex": "<tool_call>"})
    assert (content, made, reason) == ("<tool_call>", [], "stop")


def test_the_template_gets_the_tools_that_may_be_called(client: openai.OpenAI) -> None:
    auto, none, without = (
        ask(client, max_tokens=1, **options).usage.prompt_tokens
        for options in ({}, {"tool_choice": "none"}, {"tools": openai.NOT_GIVEN})
    )
    assert auto > none == without


MESSAGES = [{"role": "user", "content": "Rome?"}]


@pytest.mark.parametrize(
    "conversation",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "tools": TOOLS},
        {"messages": MESSAGES, "reasoning_effort": "high"},
        {"messages": MESSAGES, "reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "very high"}},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Yes"}], "continue_final_message": True},
    ],
)
def test_a_conversation_has_the_tokens_that_tokenize_says(client: openai.OpenAI, conversation: dict[str, Any]) -> None:
    url = str(client.base_url).removesuffix("v1/")
    body = {"model": "demo", **conversation, "return_token_strs": True}
    counted = httpx.post(f"{url}tokenize", json=body, timeout=30).json()
    text = httpx.post(f"{url}detokenize", json={"tokens": counted["tokens"]}, timeout=30).json()["text"]
    assert text == "".join(counted["token_strs"])
    effort = {"effort high", "effort low", "effort very high"} & set(text.split("\n"))
    wanted = conversation.get("chat_template_kwargs", conversation).get("reasoning_effort")
    assert effort == ({f"effort {wanted}"} if wanted else set())
    assert ("tool weather" in text) == ("tools" in conversation)
    done = httpx.post(f"{url}v1/chat/completions", json={**conversation, "max_tokens": 1}, timeout=30).json()
    assert counted["count"] == len(counted["tokens"]) == done["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "one of prompt, text and messages is needed, not none"),
        ({"messages": []}, "not none"),
        ({"prompt": "x", "messages": MESSAGES}, "not prompt and messages"),
        ({"prompt": "x", "tools": TOOLS}, "tools needs messages"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens cannot be served"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no URL is fetched"),
    ],
)
def test_what_cannot_be_tokenized(client: openai.OpenAI, body: dict[str, Any], message: str) -> None:
    refused = httpx.post(f"{str(client.base_url).removesuffix('v1/')}tokenize", json=body, timeout=30)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]


def test_results_go_back_to_the_model(client: openai.OpenAI) -> None:
    asked = ask(client, tool_choice={"type": "function", "function": {"name": "weather"}}).choices[0].message
    messages = [
        {"role": "user", "content": "Rome?"},
        asked.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "sun"},
    ]
    assert ask(client, messages=messages, max_tokens=4).usage.prompt_tokens > 12


def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="one form"):
        ask(client, tool_choice="required", response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="use tools"):
        ask(client, tools=openai.NOT_GIVEN, extra_body={"functions": [{"name": "f"}]})
    with pytest.raises(openai.BadRequestError, match=r"tools\.0\.function\.name"):
        ask(client, tools=[{"type": "function", "function": {"name": "a b"}}])


def test_marks_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    """The tokenizer's own template, whose mark is a token that answers are written without."""
    folder = Path(shutil.copytree(locate("demo"), tmp_path / "model"))
    tokens = json.loads((folder / "tokenizer.json").read_text())
    number = tokens["model"]["vocab"]["class"]
    tokens["added_tokens"].append(tokens["added_tokens"][0] | {"id": number, "content": "class"})
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    fields = {"content": {"content": "text"}, "thinking": {"open": "class", "content": "text"}}
    template = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\z", "fields": fields}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"response_template": template}))
    body = {"messages": [{"role": "user", "content": "x"}], "logit_bias": {str(number): 100}, "max_tokens": 3}
    with Served(model=str(folder)) as served:
        answers = [
            served.post("/v1/chat/completions", body | extra).json()["choices"][0]["message"]
            for extra in ({}, {"separate_reasoning": False})
        ]
    assert [(a["content"], a.get("reasoning_content")) for a in answers] == [("", "classclass"), ("", None)]
