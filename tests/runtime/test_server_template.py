"""Chat templates: they come with models, so they are kept in a sandbox and on a clock."""

from __future__ import annotations

import time
from typing import Any

import pytest

from runtime.checkpoint import locate
from runtime.errors import InvalidRequest
from runtime.server.template import render

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate("demo"))


def test_messages_and_options_reach_the_template(tokenizer: Any) -> None:
    template = "{{ messages[0].content }} {{ tone }}{% if add_generation_prompt %}>{% endif %}"
    assert render(tokenizer, template, MESSAGES, options={"tone": "loud"}) == "hello loud>"
    assert render(tokenizer, template, MESSAGES, add_generation_prompt=False) == "hello "


def test_a_template_that_does_not_end_is_stopped(tokenizer: Any) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"longer than 0\.3 s"):
        render(tokenizer, endless, MESSAGES, seconds=0.3)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages[0].missing.missing }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% nonsense %}",
    ],
)
def test_what_a_template_may_not_do_is_that_requests_fault(tokenizer: Any, template: str) -> None:
    with pytest.raises(InvalidRequest, match="the chat template refused these messages"):
        render(tokenizer, template, MESSAGES)


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "tools", "return_dict", "add_generation_prompt", "not an identifier"]
)
def test_arguments_of_the_tokenizer_are_not_for_requests(tokenizer: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not for templates"):
        render(tokenizer, "x", MESSAGES, options={name: True})


def test_an_effort_is_for_templates_that_know_it(tokenizer: Any) -> None:
    template = "{{ reasoning_effort or 'none' }}"
    assert render(tokenizer, template, MESSAGES) == "none"
    assert render(tokenizer, template, MESSAGES, reasoning_effort="low") == "low"
    with pytest.raises(InvalidRequest, match=r"reasoning_effort cannot be served: .* does not know it"):
        render(tokenizer, "x", MESSAGES, reasoning_effort="low")


def test_a_model_without_a_template_says_so(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        render(tokenizer, None, MESSAGES)
