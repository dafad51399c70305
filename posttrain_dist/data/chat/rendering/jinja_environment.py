"""The Jinja environment in which transformers renders chat templates, without transformers.

Importing it takes seconds, and each process that tokenises would pay them. What a template may use
is the same here, to the letter of what it writes; `tests/data/chat/test_jinja_environment.py` holds
both side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from posttrain_dist.flow import Message

# Names under which a message's thoughts are passed; templates read the first, gpt-oss the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class OutputBuffer(list[str]):
    """What a template has written so far, piece by piece."""

    _num_pieces = _characters = 0  # that were counted

    @property
    def length(self) -> int:
        """Characters of all pieces."""
        if self._num_pieces < len(self):
            self._characters += sum(map(len, self[self._num_pieces :]))
            self._num_pieces = len(self)
        return self._characters


class GenerationMarks(Extension):
    """`{% generation %} ... {% endgeneration %}`: where in the text the assistant's words stand."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(record_marks=self.record_marks)
        self._output: OutputBuffer | None = None
        self._marks: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `_mark` around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text: str = caller()
        if self._output is not None:
            start = self._output.length
            self._marks.append((start, start + len(text)))
        return text

    @contextmanager
    def record_marks(self, output: OutputBuffer, marks: list[tuple[int, int]]) -> Iterator[None]:
        """Add a pair of places to `marks` for each block that is rendered.

        Args:
            output: to which all that the template writes is added meanwhile, piece by piece.
        """
        self._output, self._marks = output, marks
        try:
            yield
        finally:
            self._output, self._marks = None, []


@lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """The template, compiled in an environment of its own.

    Raises:
        jinja2.TemplateSyntaxError: it is not valid.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def line_of(error: BaseException, template: jinja2.Template) -> int | None:
    """The line of a template in which an error was raised; null: that is not known."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            found = template.get_corresponding_lineno(traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def with_thoughts(messages: Sequence[Message]) -> list[Message]:
    """Messages whose thoughts, under whichever name, stand where templates read them."""
    found = []
    for message in messages:
        thoughts = next((message[key] for key in THOUGHTS if message.get(key) is not None), None)
        if thoughts is not None:
            message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
        found.append(message)
    return found


# ------------------------------------------------------------------- what a template may use


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `json` writes it: Jinja's own filter escapes what HTML would read."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def fixed_clock(date: str) -> Callable[[str], str]:
    """A `strftime_now` that gives one date, such as "2026-07-26", at midnight."""
    return datetime.fromisoformat(date).strftime


class _Dict:
    """`dict(...)` without what leads from the type to Python's internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As that of `dict`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)`, which refuses names that begin with an underscore."""

    # Without a name of its own, so that a template may set `self`.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _refuse_underscore(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"chat templates cannot set {name!r}: names of a namespace must not begin with an "
            "underscore"
        )
