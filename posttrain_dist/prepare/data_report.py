"""data_report.json: what is in the prepared data, and how this run takes it.

prepared/findings.json, summary.json  what was found in the rows; other runs share them
config of this run                    names, settings, paths
the batches of this run               shares of the sources, the first pack
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_dist.config import RunConfig
from posttrain_dist.data import ANSWERS
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.packs.balance import Cost, assign_packs
from posttrain_dist.data.packs.mixing import make_mixture
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.pieces import pieces
from posttrain_dist.data.prepared.summary import OF_ANSWERS, Summary
from posttrain_dist.data.read.tables import HF
from posttrain_dist.data.sources import file_sets
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.files import write_atomic
from posttrain_dist.models.folder import load_tokenizer, read_shape, resolve
from posttrain_dist.prepare.cache import tokenizer_cache


def write_data_report(config: RunConfig, prepared: Path, folder: Path) -> dict[str, Any]:
    """Write `folder`/data_report.json, and return what it holds.

    Args:
        config: of the run.
        prepared: the folder that `posttrain_dist.prepare.prepare` wrote for this config.
        folder: made if it is not there.

    Raises:
        DataError: `prepared` is not a prepared folder.
    """
    report = data_report(config, prepared)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "data_report.json", json.dumps(report, ensure_ascii=False, indent=1))
    return report


def data_report(config: RunConfig, prepared: Path) -> dict[str, Any]:
    """What data_report.json holds; `posttrain_dist.report` draws it.

    Args:
        config: of the run.
        prepared: the folder that `posttrain_dist.prepare.prepare` wrote for this config.

    Raises:
        DataError: `prepared` is not a prepared folder.
    """
    summary, found = Summary.read(prepared), _read_findings(prepared)
    examples = Examples.open(prepared, "train")
    paths = _current_paths(config, found["files"])
    template, failed = config.template, found["failed"]
    has_answers = summary.inputs["rows"] in ANSWERS
    none_failed: dict[str, Any] = {"failed": 0, "rows": []}
    return {
        "format": summary.inputs["format"],
        "name": config.name,
        "settings": {
            "format": config.data.format.name,
            "max_length": config.data.max_length,
            "long_rows": config.data.long_rows.name,
            "template": template.name,
            "template_sha256": summary.inputs["template"],
            "supervise": template.supervise.name,
            "form": template.form.name,
            "thinking": template.thinking.name,
            "variables": template.variables,
            "strict": template.strict,
            "tokenizer": config.model.path,
        },
        "files": [
            {**file, "path": paths.get(file["path"], file["path"])} for file in found["files"]
        ],
        "channels": summary.channels,
        "splits": _splits(summary, has_answers),
        "duplicates_moved": summary.duplicates_moved,
        "near_leaks": summary.near_leaks,
        "checks": [
            {
                "name": name,
                "level": check.level,
                "explain": check.explain,
                "fix": check.fix,
                "checked": found["num_rows"],
                "failed": failed.get(name, none_failed)["failed"],
                "rows": [_current(row, paths) for row in failed.get(name, none_failed)["rows"]],
            }
            for name, check in CHECKS.items()
            if has_answers or not check.of_answers
        ],
        "rejected": [
            {**row, "file": paths.get(row["file"], row["file"])} for row in found["rejected"]
        ],
        "turns": {**found["turns"], "of": found["num_rows"]},
        "sources": _source_shares(config, examples),
        "examples": {
            channel: [{**each, "where": _current(each["where"], paths)} for each in conversations]
            for channel, conversations in found["examples"].items()
        },
        "batch": _first_pack(config, examples),
    }


def _splits(summary: Summary, has_answers: bool) -> dict[str, dict[str, dict[str, Any]]]:
    left_out = () if has_answers else OF_ANSWERS
    return {
        name: {
            channel: {key: n for key, n in asdict(counts).items() if key not in left_out}
            for channel, counts in of_split.items()
        }
        for name, of_split in summary.splits.items()
    }


def _read_findings(prepared: Path) -> dict[str, Any]:
    path = prepared / "findings.json"
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"the findings of the prepared data cannot be read: {error}",
            where=str(path),
            fix=f"delete {prepared}: the data is then prepared again",
        ) from error
    return found


def _current_paths(config: RunConfig, files: list[dict[str, Any]]) -> dict[str, str]:
    """Path when the data was prepared -> path now: the cache may have met the content elsewhere."""
    try:
        now = [
            (each.name, path)
            for each in file_sets(config.data, config.objective.rows)
            for path in ([each.path] if each.path.startswith(HF) else map(str, each.files))
        ]
    except PosttrainError:
        return {}  # the files are gone
    if [source for source, _ in now] != [file["source"] for file in files]:
        return {}  # it is of a part of them
    return {file["path"]: path for file, (_, path) in zip(files, now, strict=True)}


def _current(place: str, paths: Mapping[str, str]) -> str:
    """`file:line` with the file's path of now."""
    file, _, line = place.rpartition(":")
    return f"{paths.get(file, file)}:{line}"


def _source_shares(config: RunConfig, examples: Examples) -> dict[str, dict[str, float]]:
    """How much of an epoch, as it is drawn at the beginning, comes from each source."""
    mixture = make_mixture(config.data, config.seed, examples)
    if mixture is None:
        return {}
    drawn = mixture.draw(0, 0)
    sources, size = examples.units.sources[drawn], len(config.data.sources)
    rows = np.bincount(sources, minlength=size)
    tokens = np.bincount(sources, examples.units.supervised[drawn], size)
    return {
        share.name: {
            "asked": share.target,
            "rows_share": float(rows[i] / rows.sum()),
            "token_share": float(tokens[i] / tokens.sum()),
            "passes": share.passes,
        }
        for i, share in enumerate(mixture.phases[0])
    }


def _first_pack(config: RunConfig, examples: Examples) -> dict[str, Any]:
    """The first pack of a run, as a batch of its own, token by token.

    As `build.make_source` gives it to one worker, but without torch, which a report needs for
    nothing else; a test compares them.
    """
    if not len(examples):
        return {}
    added = config.model.add_tokens
    shape = read_shape(config.model.path, added)
    cost = Cost.of_model(shape.hidden_size, shape.num_layers, shape.vocab_size)
    units = examples.units
    packs = Order(
        units.lengths,
        max_length=config.data.max_length,
        window=config.data.pack_window,
        seed=config.seed,
        batch_size=config.train.batch_size,
        mixture=make_mixture(config.data, config.seed, examples),
    ).packs(1)
    costs_U = cost.of_units(units)
    costs = [costs_U[pack].sum() for pack in packs]
    pack = packs[assign_packs(np.array(costs), world=1)[0][0]]
    kept = tokenizer_cache(config.data.cache)
    tokenizer = load_tokenizer(resolve(config.model.path), kept, added)
    found: list[list[Any]] = []
    samples = [index for unit in pack.tolist() for index in units.samples(unit)]
    for sample, index in enumerate(samples):
        example = examples[index]
        weight_L = example.weight_L.copy()
        if example.parent is None:
            weight_L[0] = 0  # nothing stands before the first token to predict it from
        found += [[*p, sample] for p in pieces(example.input_ids_L, weight_L, tokenizer)]
    return {
        "tokens": int(units.lengths[pack].sum()),
        "samples": len(samples),
        "pieces": found,
        **({"units": _units_of(examples, samples)} if len(units) < len(examples) else {}),
    }


def _units_of(examples: Examples, samples: Sequence[int]) -> list[dict[str, Any]]:
    """Of each sample of a pack: the sample that it follows, what it is, and what it is worth."""
    found: list[dict[str, Any]] = []
    prompt = 0
    for place, index in enumerate(samples):
        example = examples[index]
        prompt = place if example.parent is None else prompt
        follows = None if example.parent is None else prompt
        worth = {
            key.removesuffix("_S"): float(example.extra[key])
            for key in ("role_S", "value_S")
            if key in example.extra
        }
        found.append({"follows": follows, **worth})
    return found
