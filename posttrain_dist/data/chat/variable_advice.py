"""For a row that the checks refuse: which variable of its template would let it pass."""

from __future__ import annotations

import json
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


class VariableAdvice:
    """Tries the variables that a template reads, once for each check.

    Args:
        choice: of the run.
        templates: of the run.
    """

    def __init__(self, choice: Template, templates: TemplateSet) -> None:
        self._choice, self._templates = choice, templates
        self._helping: dict[str, str] = {}  # check -> what to set; empty: nothing helps

    def extend(self, record: Record, error: CheckFailed) -> DataError:
        """The error, with a variable that helps in its advice."""
        if error.check not in _ASKED:
            return error
        if error.check not in self._helping:
            self._helping[error.check] = self._find(record)
        helping = self._helping[error.check]
        if not helping:
            return error
        fix = f"set {helping}, with which the row passes; or {error.fix}"
        return DataError(error.what, where=error.where, fix=fix)

    def _find(self, record: Record) -> str:
        template = self._templates.of(record.where, record.tools, record.variables)
        names = [name for name in template.probes.variables if name not in record.variables]
        for name in names[:_MOST]:
            for value in (False, True):
                if self._passes(record, {name: value}):
                    return f"template.variables={{{name}: {json.dumps(value)}}}"
        return ""

    def _passes(self, record: Record, variables: dict[str, Any]) -> bool:
        templates = self._templates.with_variables(variables)
        supervision = Supervision(self._choice, lambda: templates)
        chosen = self._choice.form
        forms = [Form.conversation, Form.turns] if chosen is Form.auto else [chosen]
        for form in forms:
            try:
                for _ in supervision.texts(record, form, strict=True):
                    pass
            except PosttrainError:
                continue
            return True
        return False
