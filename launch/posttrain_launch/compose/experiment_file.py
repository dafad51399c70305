"""The user's experiment YAML, checked line by line when it does not compose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_launch.compose.composer import Composer, without_hydra
from posttrain_launch.compose.keys import value_problems

PREFIX = "+experiment="


def experiment_problems(composer: Composer, groups: list[str]) -> list[PosttrainError]:
    """Every fault of the chosen experiment files, each with its line.

    Args:
        groups: the usable `group=option` overrides of the command line.
    """
    found: list[PosttrainError] = []
    for override in groups:
        if override.startswith(PREFIX):
            file = composer.file_of("experiment", override.removeprefix(PREFIX))
            if file is not None:
                found += _file_problems(composer, file, groups)
    return found


def leaves_of(file: Path) -> list[tuple[str, int, Any]]:
    """Dotted key, line and value of every line of an experiment that composes."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return list(_leaves(root)) if isinstance(root, yaml.MappingNode) else []


def _file_problems(composer: Composer, file: Path, groups: list[str]) -> list[PosttrainError]:
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return [
            ConfigError(
                f"is not YAML: {error.problem or error.context}",
                where=f"{file}:{line}",
                fix="check the indentation and the quotes there",
            )
        ]
    except (OSError, UnicodeDecodeError) as error:
        return [ConfigError(f"cannot be read: {error}", where=str(file), fix="write it as UTF-8")]
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        return [ConfigError("holds no keys", where=f"{file}:1", fix="write lines of `key: value`")]
    if not re.match(r"\s*#\s*@package\s+_global_", text):
        return [
            ConfigError(
                "does not say that its keys are those of the whole config",
                where=f"{file}:1",
                fix="make `# @package _global_` its first line",
            )
        ]
    own, found = _own_options(composer, root, file)
    typed = [g for g in groups if not g.startswith(PREFIX)]
    names = {g.split("=")[0] for g in typed}
    try:
        base = without_hydra(
            composer.compose([*typed, *(g for g in own if g.split("=")[0] not in names)])
        )
    except (HydraException, OmegaConfBaseException):
        return found
    for key, line, value in _leaves(root):
        found += value_problems(base, key, value, f"{file}:{line}: {key}")
    return found


def _own_options(
    composer: Composer, root: yaml.MappingNode, file: Path
) -> tuple[list[str], list[PosttrainError]]:
    """The options that the file's own `defaults` choose, and those that do not exist."""
    chosen: list[str] = []
    found: list[PosttrainError] = []
    for key, value in root.value:
        if key.value != "defaults" or not isinstance(value, yaml.SequenceNode):
            continue
        for entry in value.value:
            if not isinstance(entry, yaml.MappingNode):
                continue
            for name, option in entry.value:
                group = name.value.removeprefix("override").strip().lstrip("/")
                options = composer.options(group)
                if not options or not isinstance(option, yaml.ScalarNode):
                    continue
                if option.value in options:
                    chosen.append(f"{group}={option.value}")
                else:
                    found.append(
                        ConfigError(
                            f"there is no option {option.value}",
                            where=f"{file}:{name.start_mark.line + 1}: {group}",
                            fix=f"use one of: {', '.join(options)}",
                        )
                    )
    return chosen, found


def _leaves(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int, Any]]:
    """Dotted key, line and value of everything below a mapping."""
    for key, value in node.value:
        if not prefix and key.value in ("defaults", "hydra"):
            continue
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, f"{prefix}{key.value}.")
        else:
            text = yaml.serialize(value)
            yield f"{prefix}{key.value}", key.start_mark.line + 1, yaml.safe_load(text)
