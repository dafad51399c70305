"""What goes into a prepared folder: its files, and a digest of everything that decides it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain_dist.config import RunConfig
from posttrain_dist.data import ANSWERS, CLOCK, Format, Template
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet, load_templates
from posttrain_dist.data.formats.records import Reader
from posttrain_dist.data.sources import FileSet, file_sets
from posttrain_dist.errors import DataError, PosttrainError, raise_all
from posttrain_dist.models import Weights
from posttrain_dist.models.architectures.positions import check_row_length
from posttrain_dist.models.folder import (
    check_folder,
    check_tokenizer,
    grown_config,
    load_tokenizer,
    resolve,
)
from posttrain_dist.models.tokenizer import ModelTokenizer
from posttrain_dist.prepare.cache import cache_folder, tokenizer_cache
from posttrain_dist.prepare.digests import Digests, state

# Version of what is written: the files of a prepared folder, and the tokens and masks that a row
# gives. Raise it with every change of these, also with a fix: entries of the cache that were made
# before are then prepared again, and a run that was begun keeps its own.
FORMAT = 9
LIBRARIES = ("jinja2", "tokenizers", "transformers")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclass(slots=True)
class Inputs:
    """Checked input."""

    model_folder: Path
    model: dict[str, Any]  # its config.json, with the vocabulary that model.add_tokens makes
    tokenizer: ModelTokenizer
    templates: TemplateSet | None  # null: the objective reads no messages
    ends: tuple[str, ...]  # tokens at which generation stops, by generation_config.json
    template: Template  # the group, with the date of today where its template writes that
    date: str | None  # that date; null: no template reads the clock, or the config says it
    sets: list[FileSet]
    readers: list[Reader]  # one per file set
    states: dict[Path, tuple[int, int, int]]  # of the files of rows, when they were hashed
    digest: dict[str, Any]  # equal digests, equal content of the prepared folder

    @property
    def key(self) -> str:
        """Name of the folder in the cache."""
        text = json.dumps(self.digest, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


PLAIN = frozenset({Format.prompt_completion, Format.tokens})  # need no chat template


def fingerprint(config: RunConfig, *, only_heldout: bool) -> Inputs:
    """Check model folder, tokenizer, template and files; hash them, and read the first rows.

    Raises:
        PosttrainError: one of them cannot be used.
    """
    model_folder = resolve(config.model.path)
    model = check_folder(model_folder, config.model.weights is Weights.load)
    rows, data = config.objective.rows, config.data
    check_row_length(model, data.max_length)
    sets = file_sets(data, rows, only_heldout=only_heldout)
    tokenizer, model = _with_added_tokens(config, model_folder, model)
    check_tokenizer(tokenizer, model_folder)
    readers = _readers(sets, config)
    ends = _generation_ends(model_folder, tokenizer)
    template, templates, date = config.template, None, None
    # A base model without one reads such rows all the same; one of them that is a conversation
    # after all asks for it then.
    bare = template.name == "tokenizer" and not tokenizer.chat_template
    if rows != "text" and not (bare and all(each.format in PLAIN for each in readers)):
        templates = load_templates(template, tokenizer, model_folder, ends)
        if templates.reads_clock():
            date = datetime.now().date().isoformat()
            templates = templates.with_variables({CLOCK: date})
            template = replace(template, variables=templates.variables)
    own_heldout = any(each.split == "eval" for each in sets)
    digests = Digests(cache_folder(data.cache) / "hashes.json")
    states = {file: state(file) for each in sets for file in each.files}
    digest = {
        "format": FORMAT,
        "versions": {name: version(name) for name in LIBRARIES},
        "rows": rows,
        **_of_answers(config, sets),
        "only_heldout": only_heldout,
        "max_length": data.max_length,
        "long_rows": data.long_rows.name,
        "eval_fraction": None if own_heldout else data.eval_fraction,
        "seed": None if own_heldout else config.seed,
        "row_format": data.format.name,
        "columns": data.columns,
        "on_bad_row": data.on_bad_row.name,
        "template": None if templates is None else templates.sha256,
        **_of_template(config.template),
        "ends": list(ends),
        "date": date,
        # In their order: a sample knows its source by number.
        "sets": [[each.name, each.split, *each.identity] for each in sets],
        "data": {
            each.name: {f"{i}:{file.name}": digests.of(file) for i, file in enumerate(each.files)}
            for each in sets
        },
        "tokenizer": _of_tokenizer(model_folder, digests),
        **_of_choices(config),
    }
    digests.save()
    return Inputs(
        model_folder,
        model,
        tokenizer,
        templates,
        ends,
        template,
        date,
        sets,
        readers,
        states,
        digest,
    )


def _of_choices(config: RunConfig) -> dict[str, Any]:
    """What is left out where it is as it always was, so that older folders keep their key."""
    added, shared = config.model.add_tokens, config.data.share_prompt
    return {
        **({} if shared else {"share_prompt": False}),
        **({"add_tokens": list(added)} if added else {}),
    }


def _with_added_tokens(
    config: RunConfig, folder: Path, model: dict[str, Any]
) -> tuple[ModelTokenizer, dict[str, Any]]:
    """Tokenizer and config.json of a model folder, with `model.add_tokens`."""
    kept, added = tokenizer_cache(config.data.cache), config.model.add_tokens
    return load_tokenizer(folder, kept, added), grown_config(folder, model, added, kept)


def _generation_ends(model_folder: Path, tokenizer: ModelTokenizer) -> tuple[str, ...]:
    """The tokens at which generation stops; none where generation_config.json names none."""
    try:
        found = json.loads((model_folder / "generation_config.json").read_bytes())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    ids = found if isinstance(found, list) else [found]
    backend = tokenizer.backend_tokenizer
    names = (backend.id_to_token(i) for i in ids if type(i) is int and i >= 0)
    return tuple(name for name in names if name)


def _of_tokenizer(folder: Path, digests: Digests) -> dict[str, str]:
    there = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    return {name: digests.of(folder / name) for name in there}


def _of_answers(config: RunConfig, sets: list[FileSet]) -> dict[str, Any]:
    """What decides the units of rows with answers, beside what decides all rows."""
    if config.objective.rows not in ANSWERS:
        return {}
    converts = [each.converts for each in sets]
    refused = {"without_margin": True} if config.objective.without_margin else {}
    return {"own_rows": config.objective.own_rows, "converts": converts, **refused}


def _of_template(template: Template) -> dict[str, Any]:
    """What the group `template` says beside which one it is."""
    return {
        "variant": template.variant,
        "variables": template.variables,
        "form": template.form.name,
        "thinking": template.thinking.name,
        "supervise": template.supervise.name,
        "end_of_turn": template.end_of_turn,
        "strict": template.strict,
    }


def _readers(sets: list[FileSet], config: RunConfig) -> list[Reader]:
    readers: list[Reader] = []
    problems: list[PosttrainError] = []
    for each in sets:
        try:
            readers.append(each.reader(config.data, config.objective.rows))
        except PosttrainError as error:
            problems.append(error)
    raise_all(problems)
    return readers


def refuse_changed(inputs: Inputs) -> None:
    """See that no file of rows changed since it was hashed: what was read would not be known.

    Raises:
        DataError: one did.
    """
    for file, before in inputs.states.items():
        if state(file) != before:
            raise DataError(
                "changed while it was read",
                where=str(file),
                fix="wait until it is written, then start again",
            )


def changed(digest: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Names of the inputs that differ; a run goes on another day, with other libraries and code."""
    names = (digest.keys() | before.keys()) - {"versions", "format", "date"}
    return sorted(name for name in names if digest.get(name) != before.get(name))
