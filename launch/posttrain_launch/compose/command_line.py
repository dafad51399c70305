"""What stands behind a verb, taken apart: Hydra's flags, overrides, and words that are neither.

Flags and overrides come in any order. A word that is neither is no usage error here: it is kept,
and `compose.misused_words` says what to write instead, beside every other problem.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from argparse import Action, Namespace
from dataclasses import dataclass

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from posttrain_dist.config import Ray, Slurm
from posttrain_dist.errors import ConfigError
from posttrain_launch.compose.formulas.log_range import write_out_log_range

# Flags of single verbs beside Hydra's. A value is written behind some of them, and may be behind
# others; ADAPTER may be given several times.
ADAPTER, FORCE = "--adapter", "--force"
OWN_FLAGS: dict[str, tuple[str, ...]] = {
    "train": (FORCE,),
    "submit": ("--dry-run", "--wait", FORCE),
    "inspect": ("--template",),
    "evaluate": (ADAPTER,),
    "plan": ("--all", "--largest", "--fewest", "--json", "--html"),
}
WITH_VALUE = {
    ADAPTER: "NAME=FOLDER",
    "--largest": "data.max_length",
    "--fewest": "gpus",
}
MAYBE_VALUE = ("--json", "--html")  # a file


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
    own: dict[str, list[str]]  # flags of the verb that were given, each with its values

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be submitted."""
        return "--dry-run" in self.own

    @property
    def force(self) -> bool:
        """Whether what cannot fit is to be started all the same."""
        return FORCE in self.own

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
    own, faults, arguments = _take_own(OWN_FLAGS.get(verb, ()), arguments)
    arguments = _with_ranges(arguments, faults)
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
    if verb == "plan" and not shows_page:
        added += _left_to_the_planner(words.overrides)
    flags.overrides = [*words.overrides, *added]
    return CommandLine(
        verb,
        [*arguments, *added],
        flags,
        flags.overrides,
        words.misused,
        [*words.faults, *faults],
        debug,
        own,
    )


def typed_keys(overrides: list[str]) -> frozenset[str]:
    """The keys and groups of overrides."""
    return frozenset(word.partition("=")[0].lstrip("+") for word in overrides)


def _left_to_the_planner(overrides: list[str]) -> list[str]:
    """What a plan takes for groups that were not typed; an experiment has them all."""
    keys = typed_keys(overrides)
    if "experiment" in keys:
        return []
    touched = {key.partition(".")[0] for key in keys}
    added = [f"{group}=auto" for group in ("tuning", "engine") if group not in touched]
    if "cluster" not in keys:
        of_jobs = {f"cluster.{field.name}" for field in dataclasses.fields(Slurm)}
        of_jobs -= {f"cluster.{field.name}" for field in dataclasses.fields(Ray)}
        added.append("cluster=slurm" if keys & of_jobs else "cluster=ray")
    return added


def _with_ranges(arguments: list[str], faults: list[ConfigError]) -> list[str]:
    """The words with each `logrange(...)` written out, those without a fault."""
    found = []
    for word in arguments:
        try:
            found.append(write_out_log_range(word))
        except ConfigError as error:
            faults.append(error)
    return found


def _take_own(
    flags: tuple[str, ...], arguments: list[str]
) -> tuple[dict[str, list[str]], list[ConfigError], list[str]]:
    """The verb's own flags with their values, those that lack one, and what else was typed."""
    own: dict[str, list[str]] = {}
    rest, faults, left = list[str](), list[ConfigError](), list(reversed(arguments))
    while left:
        word = left.pop()
        name, equals, value = word.partition("=")
        if name not in flags:
            rest.append(word)
            continue
        values = own.setdefault(name, [])
        if equals:
            values.append(value)
        elif name in WITH_VALUE and left and not left[-1].startswith("-"):
            values.append(left.pop())
        elif name in WITH_VALUE:
            fix = f"write {name} {WITH_VALUE[name]}"
            faults.append(ConfigError("needs a value", where=name, fix=fix))
        elif name in MAYBE_VALUE and left and not (left[-1].startswith("-") or "=" in left[-1]):
            values.append(left.pop())
    return own, faults, rest


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
