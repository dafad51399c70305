"""Words of a command line that are neither flags nor overrides: what was most likely meant.

--learning_rate 1e-5, --optimizer.lr=3     keys as other programs take them
my.yaml, --config my.yaml                  a file of settings
zero3, /data/chat.jsonl, outputs/demo/...  a value without its key
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from posttrain_dist.errors import ConfigError
from posttrain_launch.cli import VERBS
from posttrain_launch.compose.command_line import OWN_FLAGS, WITH_VALUE, MisusedWord
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.keys import has_key, unknown_key_fix

_YAML = (".yaml", ".yml")
_ROWS = (".jsonl", ".json", ".parquet", ".csv", ".gz", ".zst")
_CONFIG_FLAGS = ("config", "config_file", "conf", "cfg_path", "f")


@dataclass(frozen=True, slots=True)
class Words:
    """What cannot be used of a command line."""

    verb: str = "train"
    misused: list[MisusedWord] = field(default_factory=list)
    faults: list[ConfigError] = field(default_factory=list)  # of flags

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.misused or self.faults)


def word_problems(words: Words, composer: Composer, base: DictConfig | None) -> list[ConfigError]:
    """One problem for each word, with what to write instead.

    Args:
        composer: knows groups and options.
        base: a config that composes; None: there is none.
    """
    advice = _Advice(words.verb, composer, base)
    misused: list[MisusedWord] = []
    for each in words.misused:  # `train.steps 5` is one mistake
        before = misused[-1].word if misused and each.follows else ""
        if base is not None and has_key(base, before):
            misused[-1] = MisusedWord(f"{before} =", each.word)
        else:
            misused.append(each)
    return [*words.faults, *(advice.problem(each) for each in misused)]


class _Advice:
    def __init__(self, verb: str, composer: Composer, base: DictConfig | None) -> None:
        self.verb, self.composer, self.base = verb, composer, base

    def problem(self, misused: MisusedWord) -> ConfigError:
        word, value = misused.word, misused.value
        if word.endswith(" ="):
            key = word.removesuffix(" =")
            what = f"key and value are one word, and {value} stands apart"
            return ConfigError(what, where=key, fix=f"write {key}={value}")
        if word.startswith("-"):
            what, fix = self._flag(word, value)
        else:
            what, fix = self._bare(word)
        return ConfigError(what, where=word, fix=fix)

    # ------------------------------------------------------------------------------ dashes

    def _flag(self, word: str, value: str | None) -> tuple[str, str]:
        key = word.lstrip("-")
        if key.replace("-", "_") in _CONFIG_FLAGS and value is not None:
            return "is no flag", self._of_file(value)
        if key == "dry-run":
            return "is a flag of `posttrain submit` alone", "leave it out"
        if key == "address":
            return "is a flag of `posttrain run`", f"write cluster=ray cluster.address={value}"
        what = "is no flag; keys are given as key=value, without dashes"
        shown = "<value>" if value is None else value
        for name in (key, key.replace("-", "_")):
            if self.base is not None and has_key(self.base, name):
                return what, f"write {name}={shown}"
        group = key.replace("-", "_")
        if self.composer.options(group):
            return what, f"write {group}={value or f'<one of {self._options(group)}>'}"
        flags = [name for action in get_args_parser()._actions for name in action.option_strings]
        flags += OWN_FLAGS.get(self.verb, ())
        near = difflib.get_close_matches(
            word, [f for f in flags if f.startswith("--")], n=1, cutoff=0.75
        )
        if near and (value is None or near[0] in WITH_VALUE):
            return "is no flag", f"did you mean {near[0]}?"
        fix = "" if self.base is None else unknown_key_fix(self.base, group, value)
        if not fix or fix.endswith("lists every key"):
            fix = f"posttrain {self.verb} --help lists the flags, --cfg job every key"
        return what, fix

    def _options(self, group: str) -> str:
        return ", ".join(self.composer.options(group))

    # -------------------------------------------------------------------------- bare words

    def _bare(self, word: str) -> tuple[str, str]:
        what = "is not of the form key=value"
        path = Path(word).expanduser()
        if self.base is not None and has_key(self.base, word):
            return what, f"write {word}=<value>"
        if word.endswith(_YAML):
            return what, self._of_file(word)
        groups = [g for g in self.composer.groups() if word in self.composer.options(g)]
        if groups:
            return what, "write " + " or ".join(
                f"{'+' * (group == 'experiment')}{group}={word}" for group in groups
            )
        if word.endswith(_ROWS):
            return what, f"write data.train={word}"
        if (path / "config.yaml").is_file():
            return "is a run folder", f"posttrain run {word} goes on with it"
        if (path / "config.json").is_file():
            return what, f"write model.path={word}"
        if path.exists() or os.sep in word:
            return what, f"write data.train={word} for rows, model.path={word} for a model"
        if word in VERBS:
            return (
                "is a verb, and there is one already",
                f"posttrain {word}, as a command of its own",
            )
        fix = "" if self.base is None else unknown_key_fix(self.base, word, "<value>")
        if not fix or fix.endswith("lists every key"):
            fix = f"write {word}=<value>"
        return what, fix

    def _of_file(self, name: str) -> str:
        """What to do with a file of settings."""
        path = Path(name)
        if path.name == "config.yaml" and (path.parent / "run.json").is_file():
            return f"posttrain run {path.parent} goes on with that run"
        stem = path.stem
        if path.parent.name == "experiment":
            folder = path.parent.parent
            return f"write --config-dir {folder} +experiment={stem}"
        return (
            f"settings of your own are DIR/experiment/{stem}.yaml, with `# @package _global_` as "
            f"the first line: posttrain {self.verb} --config-dir DIR +experiment={stem}; "
            f"`posttrain init {stem} --dir DIR` writes one to start from"
        )
