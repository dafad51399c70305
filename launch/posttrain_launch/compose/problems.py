"""What is wrong with a command line: every problem found in one pass, each with its cure.

Hydra stops at its first error. So when a configuration does not compose, each word of the
command line (and each line of the user's experiment) is tried alone against a config that does.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from posttrain_dist.config import problems
from posttrain_dist.errors import ConfigError, PosttrainError, raise_all
from posttrain_dist.preflight import input_problems
from posttrain_launch.compose.composer import Composed, Composer, to_composed, without_hydra
from posttrain_launch.compose.experiment_file import experiment_problems
from posttrain_launch.compose.keys import value_problems
from posttrain_launch.run.freeze import absolute

FAULTS = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    AttributeError,
    TypeError,
    ValueError,
    OSError,
)


def check(
    words: list[str],
    config_dir: str | None = None,
    *,
    sweep: bool = False,
    cross: bool = True,
    verb: str | None = None,
) -> Composed | None:
    """Compose and check what was typed.

    Args:
        words: overrides as typed, `key=value` or `group=option`.
        config_dir: the user's folder of YAML.
        sweep: the words may hold several values each; then there is no one result.
        cross: also look for values that contradict each other.
        verb: also look at the files that this verb would use.

    Raises:
        PosttrainError, SeveralErrors: all that is wrong.
    """
    with Composer(config_dir) as composer:
        if not sweep:
            try:
                composed = _compose(composer, words)
            except FAULTS as error:
                raise_all(_probe(composer, words, error, sweep=False, verb=verb))
                raise
            if cross:
                raise_all(_contradictions(composed, verb))
            return composed
        raise_all(_probe(composer, words, None, sweep=True))
    return None


def _compose(composer: Composer, words: list[str]) -> Composed:
    config = composer.compose(words)
    hydra = config.hydra
    return to_composed(without_hydra(config), hydra)


def _probe(
    composer: Composer,
    words: list[str],
    error: Exception | None,
    *,
    sweep: bool,
    verb: str | None = None,
) -> list[PosttrainError]:
    """Try each word alone; `error` is what composing all of them gave."""
    found: list[PosttrainError] = []
    good: list[str] = []  # words without a fault
    groups: list[str] = []  # `group=option` words that can be used as a base
    values: list[Override] = []
    for word, override in _parse(words, found):
        wrong = _misused(override, word, sweep)
        if wrong is not None:
            found.append(wrong)
        elif override.key_or_group.split(".")[0] == "hydra" or "/" in override.key_or_group:
            good.append(word)
        elif composer.options(override.key_or_group):
            bad = list(_option_problems(composer, override, word))
            found += bad
            if not bad:
                good.append(word)
                first = next(_values(override))
                groups.append(word.split("=")[0] + f"={first}")
        else:
            values.append(override)

    found += experiment_problems(composer, groups)
    base = _base(composer, groups)
    if base is not None:
        for override in values:
            bad = [
                p for v in _values(override) for p in value_problems(base, override.key_or_group, v)
            ]
            found += bad
            if not bad and not sweep:
                good.append(override.input_line or "")
    if not sweep:
        told = {problem.where for problem in found}
        with contextlib.suppress(*FAULTS):
            others = _contradictions(_compose(composer, good), verb)
            found += [problem for problem in others if problem.where not in told]
    if not found and error is not None:
        found.append(_from_hydra(error))
    return found


def _parse(words: list[str], found: list[PosttrainError]) -> Iterator[tuple[str, Override]]:
    parser = OverridesParser.create()
    for word in words:
        try:
            yield word, parser.parse_override(word)
        except HydraException:
            found.append(_unreadable(word))


def _unreadable(word: str) -> ConfigError:
    key, equals, value = word.partition("=")
    if not equals:
        return ConfigError("is not of the form key=value", where=word, fix=f"write {word}=<value>")
    return ConfigError(
        f"the value {value} holds a character that must be quoted, such as ( ) [ ] {{ }} , = ' #",
        where=key,
        fix=f"write {_quoted(key, value)}",
    )


def _quoted(key: str, value: str) -> str:
    inner = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{inner}"')


def _misused(override: Override, word: str, sweep: bool) -> ConfigError | None:
    key = override.key_or_group
    if override.is_delete():
        return ConfigError(
            "a key cannot be taken out", where=word, fix=f"set another value, or {key}=null"
        )
    if not key:
        return ConfigError("there is no key before '='", where=word, fix="write key=value")
    if override.is_sweep_override() and not sweep:
        value = word.partition("=")[2]
        return ConfigError(
            f"{value} means several values, one run for each",
            where=key,
            fix=f"for one value that holds such characters write {_quoted(key, value)}; "
            "for several runs add -m",
        )
    return None


def _values(override: Override) -> Iterator[Any]:
    if not override.is_sweep_override():
        yield override.value()
    elif override.is_interval_sweep():
        interval: Any = override.value()
        yield from (interval.start, interval.end)
    else:
        yield from (v.text if hasattr(v, "text") else v for v in override.sweep_iterator())


def _option_problems(composer: Composer, override: Override, word: str) -> Iterator[PosttrainError]:
    group = override.key_or_group
    options = composer.options(group)
    if override.is_add() and group != "experiment":
        yield ConfigError(
            "has an option already", where=word, fix=f"leave the + out: {word.lstrip('+')}"
        )
    for value in _values(override):
        if str(value) not in options:
            yield ConfigError(
                f"there is no option {value}",
                where=group,
                fix=f"use one of: {', '.join(options)}",
            )


def _base(composer: Composer, groups: list[str]) -> DictConfig | None:
    """A config that composes, as near to what was asked for as can be."""
    plain = [g for g in groups if not g.startswith("+experiment=")]
    for words in (groups, plain, []):
        try:
            return without_hydra(composer.compose(words))
        except FAULTS:
            continue
    return None


def _contradictions(composed: Composed, verb: str | None) -> list[PosttrainError]:
    config = absolute(composed.config)
    return problems(config) if verb is None else input_problems(config, verb)


def _from_hydra(error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    where = str(getattr(error.__cause__ or error, "full_key", "") or "")
    return ConfigError(
        " ".join(lines[:3]) or type(error).__name__,
        where=where,
        fix="posttrain train --help lists the groups, --cfg job every key; --debug shows the trace",
    )
