r"""The pattern with which a pre-tokenizer cuts words, as a pattern of Python.

Both engines backtrack and take the first alternative that fits, and what these patterns are made of
means the same to both, but for the classes of characters: \p{L} is unknown to `re`, and what is a
letter depends on the version of Unicode. So classes are asked of the pre-tokenizers' own engine,
character by character. Patterns with anything else in them are not translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

# Characters that are looked at. Behind them stand scripts without spaces between words, whose words
# do not come again, and emoji.
LIMIT = 0x3000
_ALL = "".join(map(chr, range(LIMIT)))
UNKNOWN = re.compile(f"[^\\0-{chr(LIMIT - 1)}]")
# Of ByteLevel(use_regex=True), which keeps it to itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_PARTS = re.compile(
    r"""(?P<named>\\[pP]\{\w+\}|\\[sS])     # a class
      | (?P<plain>\\[rnt]|\\[^\w\s]|[^\\{}()\[\]^])
      | (?P<repeat>\{\d+(?:,\d*)?\}(?![+?]))
      | (?P<group>\((?!\?)|\(\?(?:[:!=]|i:)|\))
      | (?P<open>\[\^?)|(?P<close>\])|(?P<start>\^)""",
    re.VERBOSE,
)


class NotTranslated(ValueError):
    """The pattern holds what may mean something else to Python."""


def translate(pattern: str) -> re.Pattern[str]:
    """The pattern for texts of characters below LIMIT.

    Raises:
        NotTranslated: it may cut other words there.
    """
    if "++" in pattern or "*+" in pattern or "?+" in pattern or "&&" in pattern:
        raise NotTranslated("possessive repeats, or the intersection of classes")
    written, at, in_class = "", 0, False
    while at < len(pattern):
        found = _PARTS.match(pattern, at)
        if found is None:
            raise NotTranslated(pattern[at : at + 10])
        at, part = found.end(), found[0]
        if found.lastgroup == "named":
            written += members(part) if in_class else f"[{members(part)}]"
        elif found.lastgroup == "open":
            if in_class:
                raise NotTranslated("a class inside of a class")
            in_class, written = True, written + part
        elif found.lastgroup == "close":
            in_class, written = False, written + part
        elif in_class and found.lastgroup != "plain":
            raise NotTranslated(f"{part} inside of a class")
        elif found.lastgroup == "start":
            raise NotTranslated("^ is the start of a line")
        else:
            written += "(?:" if part == "(" else part  # nothing looks at what a group held
    try:
        return re.compile(written)
    except re.error as error:
        raise NotTranslated(str(error)) from error


def digit_pattern(individual: bool) -> re.Pattern[str]:
    """What Digits(individual_digits) cuts: digits, one by one or together, and what is between."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(_ALL)
    digits = [(start, end) for text, (start, end) in cut if end - start == 1 and text.isnumeric()]
    inside = _ranges(iter(digits))
    return re.compile(f"[{inside}]{'' if individual else '+'}|[^{inside}]+")


@lru_cache(maxsize=64)
def members(named: str) -> str:
    r"""The characters of a class such as \p{L}, as ranges for `[...]`.

    Raises:
        NotTranslated: the engine does not know it.
    """
    from tokenizers import Regex, pre_tokenizers

    try:
        split = pre_tokenizers.Split(Regex(f"{named}+"), "removed")
    except Exception as error:  # tokenizers raise no other
        raise NotTranslated(f"{named}: {error}") from error
    # What is left stands outside of the class.
    outside = [span for _, span in split.pre_tokenize_str(_ALL)]
    found = _ranges(_between(outside))
    if not found:
        raise NotTranslated(f"{named} has no characters")
    return found


def _between(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = 0
    for start, end in [*spans, (LIMIT, LIMIT)]:
        if start > at:
            yield at, start
        at = end


def _ranges(spans: Iterator[tuple[int, int]]) -> str:
    return "".join(f"\\u{start:04x}-\\u{end - 1:04x}" for start, end in spans)
