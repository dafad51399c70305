"""A trained chat template as it is served: what it was given in training is written into it.

A server renders a conversation by the template of the model folder alone. Variables of the run
therefore become defaults at its top, which what a request gives goes before:

    {% set enable_thinking = enable_thinking if enable_thinking is defined else false %}

Each such line ends in a line break, which transformers' environment (`trim_blocks`) leaves out: the
text that the template writes is the same with and without it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes

from posttrain_dist.data import CLOCK
from posttrain_dist.data.chat.rendering.jinja_environment import compile_template
from posttrain_dist.data.chat.rendering.template_choice import DEFAULT, TOOL_USE
from posttrain_dist.errors import ConfigError, ModelError


def served_templates(
    sources: Mapping[str, str],
    variables: Mapping[str, Any],
    *,
    variant: str | None = None,
    fixed: Collection[str] = (),
) -> dict[str, str]:
    """The templates of a model folder by name, as `apply_chat_template` chooses among them.

    Args:
        sources: name -> Jinja, as it was trained.
        variables: that the run gave to all rows; of `strftime_now` the date, as in 2026-01-31.
        variant: the one that all rows were rendered by, with tools and without.
        fixed: variables that the tokenizer always gives a value of its own, such as bos_token.

    Raises:
        ModelError: a name cannot be that of a file.
        ConfigError: what is given for the clock is no date.
    """
    chosen = dict(sources)
    if variant is not None:
        chosen.pop(TOOL_USE, None)
        chosen[DEFAULT] = sources[variant]
    for name in chosen:
        if not name or Path(name).name != name:
            raise ModelError(
                f"the tokenizer has a chat template called {name!r}, which no file can be called",
                where="chat_template",
                fix="rename it in tokenizer_config.json, or set template.variant to another one",
            )
    return {name: with_defaults(source, variables, fixed=fixed) for name, source in chosen.items()}


def with_defaults(source: str, variables: Mapping[str, Any], *, fixed: Collection[str] = ()) -> str:
    """A template that renders as it does with `variables`, which other values may replace.

    Args:
        source: Jinja.
        variables: JSON values; those that the template never names are left out.
        fixed: of these variables the value given here always holds.

    Raises:
        ConfigError: what is given for the clock is no date.
    """
    named = _names(source) if variables else set()
    lines = []
    for name, value in variables.items():
        if name not in named:
            continue
        if name == CLOCK:
            lines.append(_clock(source, str(value)))
            continue
        default = "" if name in fixed else f"{name} if {name} is defined else "
        lines.append(f"{{% set {name} = {default}{_literal(value)} %}}\n")
    return "".join(lines) + source


def _names(source: str) -> set[str]:
    tree = _parse(source)
    return set() if tree is None else {name.name for name in tree.find_all(nodes.Name)}


def _parse(source: str) -> nodes.Template | None:
    """The syntax of a template; null where it has a fault, which rendering it reports."""
    try:
        return compile_template(source).environment.parse(source)
    except TemplateSyntaxError:
        return None


def _clock(source: str, day: str) -> str:
    """A macro that gives one day, in each format that the template writes, for the clock."""
    tree = _parse(source)
    found = [] if tree is None else [each.value for each in tree.find_all(nodes.Const)]
    formats = sorted({each for each in found if isinstance(each, str) and "%" in each})
    try:
        dates = {each: datetime.fromisoformat(day).strftime(each) for each in formats}
    except ValueError as error:
        raise ConfigError(
            f"is {day!r}, no date that the clock of a chat template could give",
            where=f"template.variables.{CLOCK}",
            fix="write it as in 2026-01-31",
        ) from error
    known = f"{_literal(dates)}.get(format)"
    refusal = 'raise_exception("this template has no date in the format " ~ format)'
    return f"{{% macro {CLOCK}(format) %}}{{{{ {known} or {refusal} }}}}{{% endmacro %}}\n"


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        pairs = (f"{_literal(key)}: {_literal(each)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    # Not as ASCII: Jinja takes the two halves of an escaped character for two.
    return json.dumps(value, ensure_ascii=False)
