"""What can be wrong with the tokens of a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posttrain_dist.data.tokens.text_tokens import Ints, TextTokens


def prompt_token_fault(ids_L: Ints, first: int, tail: Sequence[int], turn: str) -> str:
    """An inference prompt whose last tokens, from token `first` on, are not in `ids_L`."""
    if ids_L[first : first + len(tail)].tolist() == tail:
        return ""
    return (
        f"the tokens of the inference prompt{turn} do not begin the training tokens: the answer's "
        "first characters merge with the prompt's last"
    )


def end_token_fault(
    text: str, tokens: TextTokens, spans: Sequence[tuple[int, int, float]], ids: Mapping[str, int]
) -> str:
    """A supervised turn whose end token the tokenizer writes in pieces.

    Args:
        spans: characters that are targets.
        ids: of the control tokens.
    """
    names = tuple(ids)
    for start, end, _ in spans:
        said = text[start:end].rstrip()
        if not said.endswith(names):
            continue
        last = int(np.searchsorted(tokens.end_L, start + len(said)))
        if last == len(tokens.ids_L) or int(tokens.ids_L[last]) not in ids.values():
            name = max((name for name in names if said.endswith(name)), key=len)
            return f"the tokenizer does not write {name} as one token behind a turn"
    return ""


def bos_fault(
    ids_L: Ints,
    bos: int | None,
    eos: int | None,
    name: str,
    is_space: Callable[[int], bool] = lambda i: False,
) -> str:
    """A begin-of-text token that stands neither first nor behind the end of a text or turn.

    Args:
        is_space: whether token i is white space, which may stand between both.
    """
    if bos is None or bos == eos or np.count_nonzero(ids_L == bos) < 2:
        return ""
    ids = ids_L.tolist()
    if ids[0] == ids[1] == bos:
        return f"begins with two {name} tokens"
    wrong = []
    for i in (np.flatnonzero(ids_L[1:] == bos) + 1).tolist():
        before = i - 1
        while before > 0 and is_space(before):
            before -= 1
        if ids[before] != eos:
            wrong.append(i)
    return f"holds a second {name} token, as its token {wrong[0]}" if wrong else ""


def quote_fault(ids_L: Ints, bos: int | None, eos: int | None) -> str:
    """A row of plain text that holds a token which begins or ends one."""
    inside_L = ids_L[1:-1]
    is_quoted = any(token is not None and (inside_L == token).any() for token in (bos, eos))
    return "holds a begin or an end of text" if is_quoted else ""
