"""What is wrong with a command line: every problem found in one pass, each with its fix.

What composes is checked as it is. Hydra stops at its first error, so when a configuration does not
compose, each override of the command line (and each line of the user's experiment) is tried alone
against a config that does.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from posttrain_dist.config import problems
from posttrain_dist.errors import ConfigError, PosttrainError, raise_all
from posttrain_dist.preflight import input_problems
from posttrain_launch.compose.composer import Composed, Composer, to_composed, without_hydra
from posttrain_launch.compose.experiment_file import experiment_problems, leaves_of
from posttrain_launch.compose.formulas.relations import is_relation, relation_problem
from posttrain_launch.compose.keys import is_flag, is_number, value_problems
from posttrain_launch.compose.misused_words import Words, word_problems
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.compose.spellings import foreign_template
from posttrain_launch.compose.tuning_spellings import foreign_option

MOST_COMBINATIONS = 50  # that are composed before a sweep begins, each in 0.3 s
FAULTS = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    AttributeError,
    TypeError,
    ValueError,
    OSError,
)


def compose_checked(
    composer: Composer,
    overrides: list[str],
    *,
    contradictions: bool = True,
    verb: str | None = None,
    words: Words | None = None,
) -> Composed:
    """Compose once and check what was typed.

    Args:
        overrides: as typed, `key=value` or `group=option`.
        contradictions: also look for values that contradict each other.
        verb: also look at the files that this verb would use.
        words: of the command line, that are no overrides.

    Raises:
        PosttrainError, SeveralErrors: all that is wrong.
    """
    if words or any(override.startswith("~") for override in overrides):
        raise_all(_override_problems(composer, overrides, verb=verb, words=words))
    try:
        composed = _compose(composer, overrides)
    except (*FAULTS, ConfigError) as error:  # ours: of relations between keys
        raise_all(_override_problems(composer, overrides, error, verb=verb))
        raise
    if _holds_loose_flag(composer, overrides, composed):
        raise_all(_override_problems(composer, overrides, verb=verb))
    if contradictions:
        raise_all(_contradictions(composed, verb))
    return composed


def check_sweep(composer: Composer, overrides: list[str], words: Words | None = None) -> None:
    """Check overrides that may hold several values each; the files of a run when it comes.

    Raises:
        PosttrainError, SeveralErrors: all that is wrong.
    """
    found = _override_problems(composer, overrides, sweep=True, words=words)
    raise_all(list({str(problem): problem for problem in found}.values()))  # once for all values
    raise_all(_trial_problems(composer, overrides))


def _trial_problems(composer: Composer, overrides: list[str]) -> list[PosttrainError]:
    """What no trial can be started with: each value is tried with the first ones of the others,
    and then every combination, if they are not too many."""
    choices = [_single(override, text) for text, override in _parse(overrides, [])]
    first = [texts[0] for texts in choices]
    tried: list[tuple[str, ...]] = [
        (*first[:i], text, *first[i + 1 :]) for i, texts in enumerate(choices) for text in texts
    ]
    if math.prod(map(len, choices)) <= MOST_COMBINATIONS:
        tried += itertools.product(*choices)
    trials = dict.fromkeys(tried)
    found: dict[str, PosttrainError] = {}
    for trial in trials:
        with contextlib.suppress(*FAULTS):
            try:
                others = _contradictions(_compose(composer, list(trial)), None)
            except ConfigError as error:  # of a relation
                others = [error]
            found |= {str(problem): problem for problem in others}
    return list(found.values())


def _single(override: Override, text: str) -> list[str]:
    """The overrides of one value each that a sweep stands for; of an interval its ends."""
    if override.is_interval_sweep():
        return [f"{override.get_key_element()}={value}" for value in _values(override)]
    if override.is_sweep_override():
        values = override.sweep_string_iterator()
        return [f"{override.get_key_element()}={value}" for value in values]
    return [text]


def _holds_loose_flag(composer: Composer, overrides: list[str], composed: Composed) -> bool:
    """Whether a number was given for true or false: OmegaConf makes true of -1."""
    given: list[tuple[str, Any]] = []
    for _, override in _parse(overrides, []):
        if not override.is_sweep_override():
            given.append((override.key_or_group, override.value()))
    experiment = composed.choices.get("experiment")
    file = composer.file_of("experiment", experiment) if experiment else None
    if file is not None:
        given += [(key, value) for key, _, value in leaves_of(file)]
    numbers = [key for key, value in given if is_number(value)]
    if not numbers:
        return False
    config = OmegaConf.structured(composed.config)
    return any(is_flag(config, key) for key in numbers)


def _compose(composer: Composer, overrides: list[str]) -> Composed:
    config = composer.compose(overrides)
    hydra = config.hydra
    return to_composed(without_hydra(config), hydra)


def _override_problems(
    composer: Composer,
    overrides: list[str],
    error: Exception | None = None,
    *,
    sweep: bool = False,
    verb: str | None = None,
    words: Words | None = None,
) -> list[PosttrainError]:
    """Try each override alone; `error` is what composing all of them gave."""
    found: list[PosttrainError] = []
    good: list[str] = []  # overrides without a fault
    groups: list[str] = []  # `group=option` overrides that can be used as a base
    values: list[Override] = []
    for text, override in _parse(overrides, found):
        wrong = _misused(override, text, sweep)
        if wrong is not None:
            found.append(wrong)
        elif override.key_or_group.split(".")[0] == "hydra" or "/" in override.key_or_group:
            good.append(text)
        elif composer.options(override.key_or_group):
            bad = list(_option_problems(composer, override, text))
            found += bad
            if not bad:
                good.append(text)
                first = next(_values(override))
                groups.append(text.split("=")[0] + f"={first}")
        else:
            values.append(override)

    found += experiment_problems(composer, groups)
    base = _base(composer, groups)
    if words:
        found = [*word_problems(words, composer, base), *found]
    if base is not None:
        for override in values:
            bad = [
                p
                for v in _values(override)
                for p in _value_problems(base, override.key_or_group, v)
            ]
            found += bad
            if not bad and not sweep:
                good.append(override.input_line or "")
    if not sweep:
        places = {problem.where for problem in found}
        with contextlib.suppress(*FAULTS, ConfigError):
            others = _contradictions(_compose(composer, good), verb)
            found += [problem for problem in others if problem.where not in places]
    if not found and error is not None:
        found.append(error if isinstance(error, PosttrainError) else _from_hydra(error))
    return found


def _value_problems(base: DictConfig, key: str, value: Any) -> list[ConfigError]:
    if is_relation(base, key, value):
        wrong = relation_problem(base, key, value)
        return [] if wrong is None else [wrong]
    return value_problems(base, key, value)


def _parse(overrides: list[str], found: list[PosttrainError]) -> Iterator[tuple[str, Override]]:
    parser = OverridesParser.create()
    for text in overrides:
        try:
            yield text, parser.parse_override(text)
        except HydraException:
            found.append(_unreadable(text))


def _unreadable(text: str) -> ConfigError:
    key, _, value = text.partition("=")
    if not key.isascii():
        return ConfigError(
            "unknown key", where=key, fix="posttrain train --cfg job lists every key"
        )
    special = [letter for letter in "()[]{},='\"#:\\" if letter in value]
    special += sorted({letter for letter in value if not letter.isascii()})
    holds = f"holds {' '.join(special)}, which must be quoted" if special else "cannot be read"
    return ConfigError(f"the value {value} {holds}", where=key, fix=f"write {_quoted(key, value)}")


def _quoted(key: str, value: str) -> str:
    inner = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{inner}"')


def _misused(override: Override, text: str, sweep: bool) -> ConfigError | None:
    key = override.key_or_group
    if override.is_delete():
        plain = key.lstrip("~")
        fix = f"set another value: {plain}=<value>, or leave it out: the default is then taken"
        return ConfigError("a key cannot be taken out", where=text, fix=fix)
    if not key:
        return ConfigError("there is no key before '='", where=text, fix="write key=value")
    if override.is_sweep_override() and not sweep:
        value = text.partition("=")[2]
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
        ends = (interval.start, interval.end)  # floats, also of a key that takes whole numbers
        yield from (int(end) if float(end).is_integer() else end for end in ends)
    else:
        yield from (v.text if hasattr(v, "text") else v for v in override.sweep_iterator())


def _option_problems(composer: Composer, override: Override, text: str) -> Iterator[PosttrainError]:
    group = override.key_or_group
    options = composer.options(group)
    if override.is_add() and group != "experiment":
        yield ConfigError(
            "has an option already", where=text, fix=f"leave the + out: {text.lstrip('+')}"
        )
    for value in _values(override):
        if str(value) not in options:
            fix = _option_fix(group, str(value), options)
            yield ConfigError(f"there is no option {value}", where=group, fix=fix)


def _option_fix(group: str, value: str, options: list[str]) -> str:
    known = foreign_option(group, value)
    if group == "template" and (name := foreign_template(value)):
        known = f"template={name}"
    if known is not None:
        return f"write {known} (that is the name here)"
    fix = f"use one of: {', '.join(options)}"
    return f"{fix}; a file is template.name=<path>.jinja" if group == "template" else fix


def _base(composer: Composer, groups: list[str]) -> DictConfig | None:
    """A config that composes, as near to what was asked for as can be."""
    plain = [g for g in groups if not g.startswith("+experiment=")]
    for overrides in (groups, plain, []):
        try:
            return without_hydra(composer.compose(overrides))
        except FAULTS:
            continue
    return None


def _contradictions(composed: Composed, verb: str | None) -> list[PosttrainError]:
    config = with_absolute_paths(composed.config)
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
