"""Templates that write message after message: one rendering then holds those of all prefixes.

Whether a template is of that kind is read from its syntax: it walks through the messages once, at
its top level, and no statement looks at a message behind the present one. What stands before
message k is then the same whatever follows, so that

    inference prompt of message k  =  text before message k  +  what the generation prompt adds

Other templates (those that ask for the last message, say) have their prefixes rendered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, SupportsIndex

import jinja2
from jinja2 import nodes

from posttrain_dist.data.chat.rendering.jinja_environment import OutputBuffer

_BACKWARD = {"first", "index", "index0", "previtem", "depth", "depth0", "cycle", "changed"}
_ELSEWHERE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
_PER_ROW = {"messages", "tools", "documents"}
_PROMPT = "add_generation_prompt"


class TracedMessages(list[Any]):
    """Messages that record how much was written when the template reached each of them."""

    def __init__(
        self, messages: Any, output: OutputBuffer, starts: dict[int, int], first: int = 0
    ) -> None:
        super().__init__(messages)
        self._output, self._starts, self._first = output, starts, first

    def __iter__(self) -> Iterator[Any]:
        for i, message in enumerate(super().__iter__()):
            self._starts[self._first + i] = self._output.length
            yield message
        self._starts[self._first + len(self)] = self._output.length

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            return found
        first = self._first + key.indices(len(self))[0]
        return TracedMessages(found, self._output, self._starts, first)


def is_causal(source: str, environment: jinja2.Environment) -> bool:
    """Whether the prefixes of a conversation can be cut from its rendered text; no if in doubt."""
    tree = environment.parse(source)
    if any(next(tree.find_all(kind), None) for kind in _ELSEWHERE):
        return False
    starts = _start_names(tree)
    names = _Names({"messages"} | _other_names(tree, starts), starts)
    loops = [loop for loop in tree.find_all(nodes.For) if _is_messages(loop.iter, names)]
    if len(loops) != 1 or loops[0] not in tree.body:
        return False
    loop = loops[0]
    if loop.test or loop.else_ or loop.recursive:
        return False
    at = tree.body.index(loop)
    before, after = tree.body[: at + 1], tree.body[at + 1 :]
    return (
        _looks_at_first_only(tree, names)
        and all(map(_looks_back_only, loop.body))
        and not any(n.name == _PROMPT for part in before for n in _names(part))
        and _is_constant(after, _assigned(tree) | names.messages | _PER_ROW)
    )


class _Names(NamedTuple):
    """What names of a template stand for."""

    messages: set[str]  # the messages, or those from some place on
    starts: set[str]  # a place, counted from the first message


def _is_messages(node: nodes.Node, names: _Names) -> bool:
    """The messages, or those of them from some place on."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        part = node.arg
        is_place = part.start is None or _is_start(part.start, names.starts)
        return is_place and not (part.stop or part.step) and _is_messages(node.node, names)
    return isinstance(node, nodes.Name) and node.name in names.messages


def _is_start(node: nodes.Node, starts: set[str]) -> bool:
    """A place that is counted from the first message, never from the last."""
    if isinstance(node, nodes.CondExpr):
        others = [node.expr2] if node.expr2 is not None else []
        return all(_is_start(each, starts) for each in (node.expr1, *others))
    if isinstance(node, nodes.Const):
        return isinstance(node.value, int) and node.value >= 0
    return isinstance(node, nodes.Name) and node.name in starts


def _start_names(tree: nodes.Template) -> set[str]:
    """Names that are only ever set to such a place."""
    found: dict[str, bool] = {}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            name = assign.target.name
            found[name] = found.get(name, True) and _is_start(assign.node, set())
    return {name for name, always in found.items() if always}


def _whole(node: nodes.Node) -> nodes.Node:
    """The name that a slice, or a slice of a slice, is taken of."""
    return _whole(node.node) if isinstance(node, nodes.Getitem) else node


def _other_names(tree: nodes.Template, starts: set[str]) -> set[str]:
    """Names that only ever stand for the messages, or those from some place on."""
    found: dict[str, bool] = {}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            name = assign.target.name
            own = _Names({"messages"}, starts)
            found[name] = found.get(name, True) and _is_messages(assign.node, own)
    return {name for name, always in found.items() if always}


def _looks_at_first_only(tree: nodes.Template, names: _Names) -> bool:
    """No use of the messages but as a whole list, or `messages[0]`."""
    allowed = set()
    for node in tree.find_all((nodes.For, nodes.Assign, nodes.Getitem)):
        if isinstance(node, nodes.For) and _is_messages(node.iter, names):
            allowed.add(id(_whole(node.iter)))
        elif isinstance(node, nodes.Assign) and _is_messages(node.node, names):
            if isinstance(node.target, nodes.Name) and node.target.name in names.messages:
                allowed.add(id(_whole(node.node)))
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            of_all = isinstance(node.node, nodes.Name) and node.node.name == "messages"
            if of_all and node.arg.value == 0:
                allowed.add(id(node.node))
    if "messages" in _assigned(tree):
        return False
    return all(
        id(name) in allowed or name.ctx == "store"
        for name in _names(tree)
        if name.name in names.messages
    )


def _looks_back_only(node: nodes.Node) -> bool:
    """No use of the loop's own state that depends on what follows."""
    if isinstance(node, nodes.Getattr) and _is_loop(node.node):
        return node.attr in _BACKWARD
    if isinstance(node, nodes.Getitem) and _is_loop(node.node):
        return isinstance(node.arg, nodes.Const) and node.arg.value in _BACKWARD
    if _is_loop(node):
        return False
    if isinstance(node, nodes.For):  # in its body, `loop` is another one
        outside = [node.iter, *node.else_, *([node.test] if node.test else [])]
        return all(map(_looks_back_only, outside))
    return all(map(_looks_back_only, node.iter_child_nodes()))


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _is_constant(part: list[nodes.Node], varying: set[str]) -> bool:
    return not any(name.name in varying for node in part for name in _names(node))


def _assigned(tree: nodes.Template) -> set[str]:
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    spaces = {reference.name for reference in tree.find_all(nodes.NSRef)}
    return macros | spaces | {name.name for name in _names(tree) if name.ctx == "store"}


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)
