"""Arithmetic over dotted keys, `2 * tuning.rank`: a small grammar of its own, never `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

Number = int | float
MOST_BITS = 256  # of a power of whole numbers; 9**9**9 would take all memory

_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def parse_formula(text: str) -> ast.expr | None:
    """The formula that a text is, with at least one key in it; None: it is another text.

    A formula has numbers, dotted keys, + - * / // % ** and parentheses.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if _is_formula(tree) and keys_of(tree) else None


def _is_formula(node: ast.expr) -> bool:
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            known = type(op) in _OPERATORS or isinstance(op, ast.Pow)
            return known and _is_formula(left) and _is_formula(right)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _is_formula(operand)
        case ast.Constant(value=value):
            return type(value) in (int, float)
    return _key(node) is not None


def keys_of(formula: ast.expr) -> list[str]:
    """The dotted keys that a formula reads, each once."""
    key = _key(formula)
    if key is not None:
        return [key]
    parts = (ast.iter_child_nodes(formula)) if not isinstance(formula, ast.Constant) else ()
    found = [key for part in parts if isinstance(part, ast.expr) for key in keys_of(part)]
    return list(dict.fromkeys(found))


def _key(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _key(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def evaluate(formula: ast.expr, values: Mapping[str, Number]) -> Number:
    """The value of a formula; `values` holds every key of it.

    Raises:
        ArithmeticError: a division by zero, or a result that no finite number stands for.
    """
    result = _value(formula, values)
    if not math.isfinite(result):
        raise OverflowError("the result is not finite")
    return result


def _value(node: ast.expr, values: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=op, operand=operand):
            inner = _value(operand, values)
            return -inner if isinstance(op, ast.USub) else inner
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, values), _value(right, values)
            return _power(a, b) if isinstance(op, ast.Pow) else _OPERATORS[type(op)](a, b)
    return values[_key(node) or ""]


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        if base.bit_length() * exponent > MOST_BITS:
            raise OverflowError("the power is too large")
        return int(base**exponent)
    result = float(base) ** exponent
    if isinstance(result, complex):
        raise ArithmeticError("a root of a negative number is not real")
    return result
