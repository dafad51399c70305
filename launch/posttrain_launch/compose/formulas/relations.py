"""`tuning.alpha=2*tuning.rank`: a number that follows from others, resolved for each run.

A value is a relation where its key takes a number and its text is arithmetic over keys; a key that
takes text keeps it as text. Relations are resolved before types are checked, in any order, also
of keys that are themselves relations.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import ConfigError
from posttrain_launch.compose.formulas.arithmetic import Number, evaluate, keys_of, parse_formula
from posttrain_launch.compose.keys import has_key, is_number, number_type, unknown_key_fix

_ROOTS = frozenset(field.name for field in fields(RunConfig))


def resolve_relations(
    overrides: list[str], compose: Callable[[list[str]], DictConfig]
) -> list[str]:
    """The overrides with each relation replaced by its number; in the order that they had.

    Args:
        compose: the config of overrides without relations; called only where there may be one.

    Raises:
        ConfigError: a relation names no key or one without a number, depends on itself, or gives
            a number that its key does not take.
    """
    base, relations = _relations_in(overrides, compose)
    values: dict[str, Number] = {}
    for key in relations:
        _resolve(key, relations, values, base, ())
    return [
        f"{word.partition('=')[0]}={values[key]!r}" if (key := _key_of(word)) in values else word
        for word in overrides
    ]


def without_relations(
    overrides: list[str], compose: Callable[[list[str]], DictConfig]
) -> list[str]:
    """The overrides that are no relations; see `resolve_relations`."""
    _, relations = _relations_in(overrides, compose)
    return [word for word in overrides if _key_of(word) not in relations]


def _relations_in(
    overrides: list[str], compose: Callable[[list[str]], DictConfig]
) -> tuple[DictConfig, dict[str, ast.expr]]:
    """The config without relations, and the formula of each key that has one."""
    found = {_key_of(word): formula for word in overrides if (formula := _formula_of(word))}
    if not found:
        return DictConfig({}), {}
    base = compose([word for word in overrides if _key_of(word) not in found])
    return base, {k: f for k, f in found.items() if number_type(base, k) is not None}


def _key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def relation_problem(base: DictConfig, key: str, value: object) -> ConfigError | None:
    """What is wrong with a value that is a relation, as far as its keys go; None: nothing."""
    formula = parse_formula(value) if isinstance(value, str) else None
    if formula is None:
        return None
    for name in keys_of(formula):
        if not has_key(base, name):
            fix = unknown_key_fix(base, name)
            return ConfigError(f"{value} names {name}, an unknown key", where=key, fix=fix)
    return None


def is_relation(base: DictConfig, key: str, value: object) -> bool:
    """Whether a value is one number computed from others."""
    if not isinstance(value, str) or number_type(base, key) is None:
        return False
    formula = parse_formula(value)
    return formula is not None and (isinstance(formula, ast.BinOp) or "." in value)


def _formula_of(word: str) -> ast.expr | None:
    """The formula in a word of the command line, if all its keys begin as ours do."""
    _, _, text = word.partition("=")
    if parse_formula(text.strip("\"' ")) is None:  # spares Hydra's parser
        return None
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except HydraException:
        return None
    if override.is_sweep_override():
        return None
    value = override.value()
    formula = parse_formula(value.text if isinstance(value, QuotedString) else str(value))
    if formula is None or not all(key.partition(".")[0] in _ROOTS for key in keys_of(formula)):
        return None
    return formula


def _resolve(
    key: str,
    relations: dict[str, ast.expr],
    values: dict[str, Number],
    base: DictConfig,
    above: tuple[str, ...],
) -> Number:
    """The number of a key: of a relation computed once, else as the config has it."""
    if key in values:
        return values[key]
    if key not in relations:
        return _configured(key, base, above)
    if key in above:
        circle = " -> ".join([*above[above.index(key) :], key])
        fix = "give one of them as a number"
        raise ConfigError(f"depends on itself: {circle}", where=key, fix=fix)
    formula = relations[key]
    inside = {k: _resolve(k, relations, values, base, (*above, key)) for k in keys_of(formula)}
    shown = f"{ast.unparse(formula)} with {', '.join(f'{k}={v}' for k, v in inside.items())}"
    try:
        result = evaluate(formula, inside)
    except ArithmeticError as error:
        raise ConfigError(f"{shown}: {error}", where=key, fix="change the formula") from error
    if number_type(base, key) is int and result != int(result):
        what = f"{shown} is {result:g}, which is not a whole number"
        raise ConfigError(what, where=key, fix="use // to divide without a rest")
    values[key] = int(result) if number_type(base, key) is int else result
    return values[key]


def _configured(key: str, base: DictConfig, above: tuple[str, ...]) -> Number:
    node: object = base
    for part in key.split("."):
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    if isinstance(node, int | float) and is_number(node):
        return node
    if not has_key(base, key):
        what, fix = f"names {key}, an unknown key", unknown_key_fix(base, key)
    else:
        what, fix = f"needs the number of {key}, which has none", f"give {key} a number"
    raise ConfigError(what, where=above[-1], fix=fix)
