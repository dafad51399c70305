"""served.json of a prepared folder: the chat templates of the trained model, and rows as a check.

Prompt     a conversation as transformers' `apply_chat_template` is given it
ServedRow  a training row's prompt, and the tokens that it has in training
Served     the templates by name, and up to three such rows
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain_dist.data import CLOCK
from posttrain_dist.data.chat.rendering.served_template import with_defaults
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message

SERVED = "served.json"
WITH_SERVED = 8  # first format of prepared data that has it


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the model is to go on with."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    # `chat_template_kwargs`; of `strftime_now` the day that the clock shows, as in 2026-01-31.
    variables: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, tokenizer: Any) -> list[int]:
        """Its token ids, by a tokenizer of transformers and its chat template.

        Raises:
            Exception: whatever the template raises on a conversation that it refuses.
        """
        variables, tools = dict(self.variables), list(self.tools) or None
        if CLOCK in variables:  # a function, which transformers takes from nobody
            own = tokenizer.get_chat_template(tools=tools)
            day = {CLOCK: variables.pop(CLOCK)}
            variables["chat_template"] = with_defaults(own, day)
        text = tokenizer.apply_chat_template(
            list(self.messages),
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
            **variables,
        )
        # The template has written the special tokens.
        return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class ServedRow:
    """The prompt of a training row, and its tokens: they begin a sample that is trained on."""

    prompt: Prompt
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server has to render as training did."""

    templates: dict[str, str]  # name -> Jinja, as the model folder gets it
    rows: list[ServedRow] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write served.json."""
        rows = [
            {
                "messages": list(row.prompt.messages),
                "tools": list(row.prompt.tools),
                "chat_template_kwargs": dict(row.prompt.variables),
                "token_ids": row.token_ids,
            }
            for row in self.rows
        ]
        values = {"templates": self.templates, "rows": rows}
        text = json.dumps(values, ensure_ascii=False, indent=1)
        (folder / SERVED).write_bytes(text.encode())

    @classmethod
    def read(cls, folder: Path) -> Served | None:
        """That of a prepared folder; null where no chat template was used, or none was kept.

        Raises:
            DataError: served.json is damaged.
        """
        file = folder / SERVED
        try:
            if not file.exists():  # of an earlier version
                return None
            values = json.loads(file.read_bytes())
            if values is None:
                return None
            rows = [
                ServedRow(
                    Prompt(row["messages"], row["tools"], row["chat_template_kwargs"]),
                    row["token_ids"],
                )
                for row in values["rows"]
            ]
            templates = {str(name): str(source) for name, source in values["templates"].items()}
            return cls(templates, rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"what the chat template is checked by cannot be read: {error}",
                where=str(file),
                fix=f"delete {folder} and go on with `posttrain run`: the data is then prepared "
                "again",
            ) from error
