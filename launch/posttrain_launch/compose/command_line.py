"""What stands behind a verb, taken apart: Hydra's flags, overrides, and words that are neither.

Flags and overrides come in any order. A word that is neither is no usage error here: it is kept,
and `compose.misused_words` says what to write instead, beside every other problem.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Action, Namespace
from dataclasses import dataclass

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from posttrain_dist.errors import ConfigError

# Flags of single verbs beside Hydra's; ADAPTER has a value and may be given several times.
ADAPTER = "--adapter"
OWN_FLAGS = {"submit": "--dry-run", "inspect": "--template", "evaluate": ADAPTER}


@dataclass(frozen=True, slots=True)
class MisusedWord:
    """A word that is neither a flag nor an override."""

    word: str  # "--learning_rate", "my.yaml"
    value: str | None = None  # that came with it
    follows: bool = False  # directly on another such word


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was typed, taken apart."""

    verb: str
    arguments: list[str]  # overrides and flags, as they were given
    flags: Namespace  # Hydra's
    overrides: list[str]
    misused: list[MisusedWord]
    faults: list[ConfigError]  # of flags: a value that is missing or none of the choices
    debug: bool
    dry_run: bool
    shows_template: bool
    adapters: list[str]  # values of --adapter

    @property
    def typed(self) -> str:
        """The command line, for the run's lineage."""
        return shlex.join(["posttrain", self.verb, *self.arguments])

    @property
    def shows_only(self) -> bool:
        """Whether a flag asks Hydra to print something and leave."""
        f = self.flags
        return bool(f.help or f.hydra_help or f.cfg or f.info or f.shell_completion)


def read_command_line(verb: str, arguments: list[str], debug: bool) -> CommandLine:
    """Take apart what stands after the verb.

    Raises:
        SystemExit: the version was asked for, and printed.
    """
    if "--version" in arguments:
        from posttrain_dist import __version__

        print(f"posttrain {__version__}")
        raise SystemExit(0)
    own, adapters = OWN_FLAGS.get(verb), list[str]()
    if own == ADAPTER:
        adapters, arguments = _take_adapters(arguments)
    has_own = own in arguments
    arguments = [a for a in arguments if a != own]
    # An experiment is no group with a default, so Hydra wants a plus; nobody need know.
    arguments = [f"+{a}" if a.startswith("experiment=") else a for a in arguments]
    words = _Words(arguments)
    flags = get_args_parser().parse_args(words.flags)
    added = []
    shows_page = flags.help or flags.hydra_help or flags.shell_completion
    if verb == "train" and not (words.overrides or words.misused or words.faults or shows_page):
        added.append("+experiment=demo")
        print("no arguments: running the demo (+experiment=demo)", file=sys.stderr)
    if verb == "submit" and not any(o.startswith("cluster=") for o in words.overrides):
        added.append("cluster=slurm")
    flags.overrides = [*words.overrides, *added]
    if own == ADAPTER and has_own:
        fix = f"write {ADAPTER} NAME=FOLDER"
        words.faults.append(ConfigError("needs a value", where=ADAPTER, fix=fix))
    return CommandLine(
        verb,
        [*arguments, *added],
        flags,
        flags.overrides,
        words.misused,
        words.faults,
        debug,
        dry_run=verb == "submit" and has_own,
        shows_template=verb == "inspect" and has_own,
        adapters=adapters,
    )


def _take_adapters(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The values of --adapter, and what else was typed; a flag without a value stays there."""
    values, rest, left = [], [], list(reversed(arguments))
    while left:
        word = left.pop()
        if word.startswith(f"{ADAPTER}="):
            values.append(word.partition("=")[2])
        elif word == ADAPTER and left and not left[-1].startswith("-"):
            values.append(left.pop())
        else:
            rest.append(word)
    return values, rest


class _Words:
    """The words behind a verb, sorted."""

    def __init__(self, arguments: list[str]) -> None:
        self.flags: list[str] = []
        self.overrides: list[str] = []
        self.misused: list[MisusedWord] = []
        self.faults: list[ConfigError] = []
        self._left = list(reversed(arguments))
        known = {name: a for a in get_args_parser()._actions for name in a.option_strings}
        is_bare = False
        while self._left:
            word = self._left.pop()
            was_bare, is_bare = is_bare, False
            name, equals, value = word.partition("=")
            if name in known:
                self._take_flag(known[name], name, value if equals else None)
            elif word.startswith("-") and word.strip("-"):
                self.misused.append(MisusedWord(name, value if equals else self._bare_word()))
            elif not word.strip("-"):
                continue  # a "--" that ends flags
            elif self._spaces_around_equals(word):
                value = f"{self._left.pop()}{self._left.pop() if self._left else ''}".lstrip("=")
                self.misused.append(MisusedWord(f"{word.rstrip('=')} =", value))
            elif equals or word.startswith("~"):
                self.overrides.append(_quote_letters(word))
            else:
                self.misused.append(MisusedWord(word, follows=was_bare))
                is_bare = True

    def _take_flag(self, flag: Action, name: str, value: str | None) -> None:
        if flag.nargs == 0:
            self.flags.append(name)
            return
        if value is None:
            value = self._bare_word(flag)
        choices = list(flag.choices or ())
        if value is None and flag.nargs != "?":
            fix = f"write {name} {choices[0] if choices else flag.dest.upper()}"
            self.faults.append(ConfigError("needs a value", where=name, fix=fix))
        elif choices and value is not None and value not in choices:
            what = f"there is no choice {value}"
            fix = f"use one of: {', '.join(choices)}"
            self.faults.append(ConfigError(what, where=name, fix=fix))
        else:
            self.flags += [name] if value is None else [name, value]

    def _bare_word(self, flag: Action | None = None) -> str | None:
        """The next word, if it can be the value of the one before."""
        word = self._left[-1] if self._left else None
        if word is None or word.startswith(("-", "~", "+")):
            return None
        if flag is None and "=" in word:
            return None
        if flag is not None and flag.nargs == "?" and word not in (flag.choices or ()):
            return None
        if flag is not None and flag.choices and "=" in word:
            return None
        return self._left.pop()

    def _spaces_around_equals(self, word: str) -> bool:
        """`optimizer.lr = 1e-5`, which a shell makes three words of."""
        return "=" not in word and bool(self._left) and self._left[-1] == "="


def _quote_letters(word: str) -> str:
    """The override with its value in quotes, where letters outside of ASCII alone call for them.

    Hydra reads such letters only in quotes, which nobody would think of.
    """
    key, _, value = word.partition("=")
    if value.isascii() or not key.isascii():
        return word
    plain = "".join(letter if letter.isascii() else "a" for letter in value)
    if _is_text(f"{key}={plain}", plain):
        quoted = f'{key}="{value}"'
        if _is_text(quoted, value):
            return quoted
    return word


def _is_text(word: str, value: str) -> bool:
    """Whether an override means just this text."""
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return not override.is_sweep_override() and str(override.value()) == value
