"""For a row that the checks refuse: which variable of its template would let it pass."""

from __future__ import annotations

import json
import re
from typing import Any

from posttrain_dist.data import Form, Template
from posttrain_dist.data.chat.checks.check_table import CheckFailed
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.chat.supervision import Supervision
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.flow import Record

# Checks on which a variable has a say: how prompts end, and where thoughts stand.
_ASKED = {"prompt_prefix", "open_thinking", "closed_thinking", "generation_prompt"}
_MOST = 12  # variables that are tried
_DETAIL = re.compile(r"\d+|'.*|\".*", re.DOTALL)  # of one row


class VariableAdvice:
    """Tries the variables that a template reads, once for each check.

    Args:
        choice: of the run.
        templates: of the run.
    """

    def __init__(self, choice: Template, templates: TemplateSet) -> None:
        self._choice, self._templates = choice, templates
        # Cause -> the variable that helps and its value, as JSON; null: none does.
        self._helping: dict[str, tuple[str, str] | None] = {}

    def extend(self, record: Record, error: DataError) -> DataError:
        """The error, with a variable that helps in its advice."""
        # What is no check's is refused by the template, or not found in its text.
        cause = error.check if isinstance(error, CheckFailed) else _DETAIL.sub("", error.what)
        if isinstance(error, CheckFailed) and cause not in _ASKED:
            return error
        if cause not in self._helping:
            self._helping[cause] = self._find(record)
        helping = self._helping[cause]
        if helping is None:
            return error
        name, value = helping
        fix = (
            f"set template.variables={{{name}: {value}}}, with which this row passes (on the row "
            f'alone: "chat_template_kwargs": {{"{name}": {value}}}); or {error.fix}'
        )
        return DataError(error.what, where=error.where, fix=fix)

    def _find(self, record: Record) -> tuple[str, str] | None:
        try:
            template = self._templates.of(record.where, record.tools, record.variables)
        except DataError:
            return None
        names = [name for name in template.probes.variables if name not in record.variables]
        for name in names[:_MOST]:
            for value in (False, True):
                is_so = template.variables.get(name) is value
                if not is_so and self._passes(record, {name: value}):
                    return name, json.dumps(value)
        return None

    def _passes(self, record: Record, variables: dict[str, Any]) -> bool:
        templates = self._templates.with_variables(variables)
        supervision = Supervision(self._choice, lambda: templates)
        chosen = self._choice.form
        forms = [Form.conversation, Form.turns] if chosen is Form.auto else [chosen]
        for form in forms:
            if form is Form.turns and not supervision.has_turns(record):
                continue
            try:
                for _ in supervision.texts(record, form, strict=True):
                    pass
            except PosttrainError:
                continue
            return True
        return False
