"""Which chat template a row is rendered by: the tokenizer's own, a shipped one, or a file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain_dist.data import CLOCK, Template
from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.errors import ConfigError, DataError, ModelError

FOLDER = Path(__file__).parent.parent / "templates"
DEFAULT, TOOL_USE = "default", "tool_use"  # names that transformers looks for
_NEEDS = re.compile(r"\{#-?\s*tokens:(.*?)-?#\}", re.DOTALL)
_WORD = re.compile(r"\w+")
_KEPT = 256  # templates with the variables of rows


class TemplateSet:
    """The templates that one choice means, by name: most tokenizers bring one, "default".

    Args:
        tokenizer: a fast tokenizer of transformers.
        sources: name -> Jinja.
        choice: which of them, and the variables of the run.
        ends: tokens at which generation stops, by the model's generation config.
        place: where they stand, for errors.
    """

    def __init__(
        self,
        tokenizer: Any,
        sources: Mapping[str, str],
        choice: Template,
        ends: Sequence[str] = (),
        place: str = "chat template",
    ) -> None:
        self.place = place
        self.sources, self.variables = dict(sources), dict(choice.variables)
        self._tokenizer, self._choice = tokenizer, choice
        self._variant, self._end_of_turn = choice.variant, choice.end_of_turn
        self._ends = tuple(ends)
        self._of_run: dict[str, ChatTemplate] = {}
        self._of_rows: dict[tuple[str, str], ChatTemplate] = {}

    @property
    def sha256(self) -> str:
        """Digest of all sources."""
        if list(self.sources) == [DEFAULT]:
            return hashlib.sha256(self.sources[DEFAULT].encode()).hexdigest()
        return hashlib.sha256(json.dumps(self.sources, sort_keys=True).encode()).hexdigest()

    def with_variables(self, variables: Mapping[str, Any]) -> TemplateSet:
        """The same templates with more variables of the run."""
        choice = replace(self._choice, variables={**self.variables, **variables})
        return TemplateSet(self._tokenizer, self.sources, choice, self._ends, self.place)

    def reads_clock(self) -> bool:
        """Whether the date of today would stand in a conversation."""
        if CLOCK in self.variables:
            return False
        ask, system = {"role": "user", "content": "a"}, {"role": "system", "content": "a"}
        tool = {"type": "function", "function": {"name": "probe", "parameters": {}}}
        probes = [(first, tools) for first in ([], [system]) for tools in ((), (tool,))]
        for source in self.sources.values():
            for first, tools in probes if CLOCK in source else ():
                texts = set()
                for date in ("2001-02-03", "2011-12-13"):
                    variables = {**self.variables, CLOCK: date}
                    template = ChatTemplate(self._tokenizer, source, variables)
                    with contextlib.suppress(DataError):
                        texts.add(template.render([*first, ask], "probe", tools=tools))
                if len(texts) > 1:
                    return True
        return False

    @property
    def plain(self) -> ChatTemplate:
        """The one for rows without tools and variables; the first one where none is for these."""
        name = self._variant or (DEFAULT if DEFAULT in self.sources else next(iter(self.sources)))
        return self.named(name)

    def of(
        self, where: str, tools: Any = (), variables: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """The template of a row, as `apply_chat_template` chooses it.

        Args:
            where: the row, for errors.
            tools: of the row.
            variables: of the row; they go before those of the run.

        Raises:
            DataError: there is none for such rows.
        """
        name = self._variant or (TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT)
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise DataError(
                f"the tokenizer has chat templates by name ({names}) and none called {DEFAULT!r}, "
                "which rows without tools are rendered by",
                where=where,
                fix=f"set template.variant=<one of {names}> for all rows, or choose another "
                "template (template=<one of docs/templates.md>)",
            )
        if not variables:
            return self.named(name)
        key = name, json.dumps(variables, sort_keys=True)
        if key not in self._of_rows:
            if len(self._of_rows) >= _KEPT:
                self._of_rows.clear()
            self._of_rows[key] = self.named(name).with_variables(variables)
        return self._of_rows[key]

    def named(self, name: str) -> ChatTemplate:
        """One of them, with the variables of the run."""
        if name not in self._of_run:
            self._of_run[name] = ChatTemplate(
                self._tokenizer,
                self.sources[name],
                self.variables,
                self._ends,
                self._end_of_turn,
                place=self.place,
            )
        return self._of_run[name]


def template_names() -> list[str]:
    """The names of the templates that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def load_templates(
    choice: Template,
    tokenizer: Any,
    model_folder: Path | None = None,
    ends: Sequence[str] = (),
) -> TemplateSet:
    """The templates that `choice.name` means: "tokenizer", a shipped one, or a .jinja file.

    Raises:
        ConfigError: there is no such template, or it needs tokens that the tokenizer lacks.
        ModelError: the template is broken, or the tokenizer was to have one and has none.
    """
    templates = _load(choice, tokenizer, model_folder, ends)
    _refuse_bad_end(choice, templates)
    _refuse_unread(choice, templates)
    _refuse_chance(templates)
    return templates


def _load(
    choice: Template, tokenizer: Any, model_folder: Path | None, ends: Sequence[str]
) -> TemplateSet:
    name = choice.name
    if name != "tokenizer" and choice.variant:
        raise ConfigError(
            f"is {choice.variant!r}, and template.name={name} is one template alone",
            where="template.variant",
            fix="leave it out; it chooses among those that a tokenizer brings by name",
        )
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template",
                where=str(model_folder or "tokenizer"),
                fix=_template_advice(tokenizer),
            )
        own = tokenizer.chat_template
        sources = {DEFAULT: own} if isinstance(own, str) else dict(own)
        _refuse_unknown_variant(choice, sources)
        place = str(model_folder) if model_folder else "tokenizer"
        return TemplateSet(tokenizer, sources, choice, ends, f"{place}: chat template")
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
    else:
        path = FOLDER / f"{name}.jinja"
        if name not in template_names():
            names = ["tokenizer", *template_names()]
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"there is no template {name!r}" + (f", did you mean {near[0]!r}?" if near else ""),
                where="template.name",
                fix=f"use one of {', '.join(names)}, or the path of a .jinja file",
            )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the template file {path} cannot be read: {error}",
            where="template.name",
            fix="give the path of a .jinja file",
        ) from error
    _refuse_missing_tokens(name, source, tokenizer, model_folder)
    return TemplateSet(tokenizer, {DEFAULT: source}, choice, ends, str(path))


def _template_advice(tokenizer: Any) -> str:
    """Which of the shipped templates a tokenizer without one has the tokens for."""
    sources = {name: (FOLDER / f"{name}.jinja").read_text("utf-8") for name in template_names()}
    fit = [name for name, source in sources.items() if not _missing_tokens(source, tokenizer)]
    first = f"set template={fit[0]}" if fit else "set template.name=<a .jinja file>"
    others = f" (or {', '.join(fit[1:])}: this tokenizer has their tokens)" if fit[1:] else ""
    return (
        f"{first}{others}, best the one of the model's instruct sibling; rows of prompt and "
        "completion as text need none"
    )


def _missing_tokens(source: str, tokenizer: Any) -> list[str]:
    """The special tokens that a template is written with and a tokenizer lacks."""
    declared = _NEEDS.search(source)
    needed = declared[1].split() if declared else []
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    variables = {n for n in needed if n in ("bos_token", "eos_token")}
    missing = [n for n in needed if n not in variables and n not in added]
    return missing + [n for n in sorted(variables) if not tokenizer.special_tokens_map.get(n)]


def _refuse_missing_tokens(
    name: str, source: str, tokenizer: Any, model_folder: Path | None
) -> None:
    missing = _missing_tokens(source, tokenizer)
    if missing:
        raise ConfigError(
            f"template {name!r} is written with {', '.join(missing)}, which the tokenizer of "
            f"{model_folder or 'this model'} does not have: they would be split into pieces of "
            "text",
            where="template.name",
            fix="choose the template of the model's own family (template=tokenizer where the "
            "model brings one), or add the tokens to the tokenizer and the embeddings",
        )


def _refuse_unknown_variant(choice: Template, sources: Mapping[str, str]) -> None:
    """A tokenizer's templates of which nothing says which one is meant."""
    names = ", ".join(sorted(sources))
    if choice.variant and choice.variant not in sources:
        raise ConfigError(
            f"there is no template {choice.variant!r}: the tokenizer has {names}",
            where="template.variant",
            fix=f"use one of {names}, or leave it out",
        )
    if not choice.variant and DEFAULT not in sources and TOOL_USE not in sources:
        raise ConfigError(
            f"the tokenizer has chat templates by name ({names}), and none is {DEFAULT!r}",
            where="template.variant",
            fix=f"set template.variant=<one of {names}>, or another template",
        )


def _refuse_bad_end(choice: Template, templates: TemplateSet) -> None:
    """An end of turn that is no token of the tokenizer, or of a template that writes another."""
    end, template = choice.end_of_turn, templates.plain
    if end is None:
        return
    known = template.controls.names
    if end not in known:
        near = difflib.get_close_matches(end, known, n=1) or sorted(known)[:8]
        raise ConfigError(
            f"{end!r} is no special token of the tokenizer",
            where="template.end_of_turn",
            fix=f"use one that it has, such as {', '.join(near)}",
        )
    own = template.probes.own_end
    if own and not own.startswith(end):
        raise ConfigError(
            f"is {end!r}, and the template ends turns itself, with {own!r}",
            where="template.end_of_turn",
            fix="leave it out; to train another end, give a copy of the template (template.name)",
        )


def _refuse_unread(choice: Template, templates: TemplateSet) -> None:
    """Variables that no template reads: a misspelt one would change nothing, without a word."""
    words = {word for source in templates.sources.values() for word in _WORD.findall(source)}
    read: set[str] = set()
    for name in templates.sources:
        read |= templates.named(name).probes.readable
    for name in choice.variables:
        if name in read or (name == CLOCK and CLOCK in words):
            continue
        near = difflib.get_close_matches(name, read, n=1)
        raise ConfigError(
            "is no variable that the chat template reads"
            + (f", did you mean {near[0]!r}?" if near else ""),
            where=f"template.variables.{name}",
            fix=f"it may read {', '.join(sorted(read))}" if read else "leave it out: it reads none",
        )


def _refuse_chance(templates: TemplateSet) -> None:
    """A template that writes another text each time: nobody is served what was trained."""
    for name in templates.sources:
        template = templates.named(name)
        texts = set()
        for _ in range(3):
            with contextlib.suppress(DataError):
                texts.add(template.render([{"role": "user", "content": "a"}], "probe"))
        if len(texts) > 1:
            raise ModelError(
                "writes another text each time that it renders the same conversation",
                where=templates.place,
                fix="take out what draws by chance (the filter `random`)",
            )
