"""What the prepared folder keeps of a tally and a split: the summary, and findings for people."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.compared.answer_lengths import compared
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.pieces import pieces
from posttrain_dist.data.prepared.summary import Counts, Summary
from posttrain_dist.data.prepared.trees import joined
from posttrain_dist.flow import Example
from posttrain_dist.metrics.watched_tokens import special_tokens
from posttrain_dist.prepare.fingerprint import Inputs
from posttrain_dist.prepare.similar import near_duplicates, near_leaks
from posttrain_dist.prepare.split import Split
from posttrain_dist.prepare.tally import Tally

# Upper edges of the histogram of lengths, in tokens: eight to an octave.
EDGES = np.array(sorted({round(2.0 ** (i / 8)) for i in range(8 * 24 + 1)}), np.int64)
# Samples that show how turns end: so many stretches all over the split, of so many samples each.
# Every place that is read keeps pages of the mapped files in memory.
_STRETCHES, _LENGTH = 8, 25
MAX_ANSWERS = 8  # of a row, that the report shows
_OF_THOUGHTS = re.compile("think|thought|reason", re.IGNORECASE)


def summarise(inputs: Inputs, tally: Tally, split: Split, folder: Path) -> Summary:
    """Counts of every channel and split.

    Args:
        folder: with `samples/`, `train.npy` and `eval.npy` written.
    """
    key_R = tally.column("key")
    again_R = np.ones(len(key_R), np.bool_)
    again_R[np.unique(key_R, return_index=True)[1]] = False
    near_R = near_duplicates(tally.bands, key_R)
    splits = {}
    for name, side_R in (("train", split.train_R), ("eval", split.heldout_R)):
        examples = Examples.open(folder, name, tally.channels)
        rows = {
            "rows": side_R,
            "truncated": side_R & tally.column("truncated"),
            "dropped": side_R & tally.column("dropped"),
            "duplicates": side_R & again_R,
            "near_duplicates": side_R & near_R & ~again_R,
        }
        splits[name] = _counts(tally, rows, examples)
    return Summary(
        channels=tally.channels,
        splits=splits,
        duplicates_moved=split.moved,
        near_leaks=int(near_leaks(tally.bands, split.train_R, split.heldout_R).sum()),
        rejected=tally.num_rejected,
        longest=tally.longest,
        largest_id=tally.largest_id,
        special_tokens=watched_tokens(inputs),
        end_token_ids=end_tokens(
            Examples.open(folder, "train", tally.channels), inputs.model_folder
        ),
        inputs=inputs.digest,
    )


def _counts(
    tally: Tally, rows: dict[str, npt.NDArray[np.bool_]], examples: Examples
) -> dict[str, Counts]:
    channel_R, size = tally.column("channel"), len(tally.channels)
    of_rows = {
        name: np.bincount(channel_R[chosen_R], minlength=size) for name, chosen_R in rows.items()
    }
    of_samples = {
        "samples": np.bincount(examples.channel_ids, minlength=size),
        "tokens": np.bincount(examples.channel_ids, examples.lengths, size),
        "supervised": np.bincount(examples.channel_ids, examples.supervised, size),
        **compared(examples, size),
    }
    return {
        channel: Counts(
            **{name: int(values[i]) for name, values in {**of_rows, **of_samples}.items()},
            lengths=_histogram(examples.units.lengths[examples.units.channel_ids == i]),
        )
        for i, channel in enumerate(tally.channels)
        if of_rows["rows"][i]
    }


def _histogram(lengths: npt.NDArray[np.int64]) -> list[list[int]]:
    """[upper edge, units] of each bin from the first used to the last, and of the one before."""
    if not len(lengths):
        return []
    bins = np.bincount(np.searchsorted(EDGES, lengths), minlength=len(EDGES))
    used = np.flatnonzero(bins)
    kept = range(max(used[0] - 1, 0), used[-1] + 1)
    return [[int(EDGES[i]), int(bins[i])] for i in kept]


# What training has to know of the tokenizer, so that it loads none.


def watched_tokens(inputs: Inputs) -> dict[int, str]:
    """The special tokens that have a loss of their own in the metrics: id -> name, ids ascending.

    Those that the chat template in use writes are among them; rows of text have no template.
    """
    source = "" if inputs.templates is None else "\n".join(inputs.templates.sources.values())
    return special_tokens(inputs.tokenizer, source)


def end_tokens(examples: Examples, model_folder: Path) -> list[int]:
    """The tokens that supervised turns end with: the last of each run of targets that follow.

    There may be several: a turn that calls a tool often ends with another one than an answer. One
    counts if it ends more than a hundredth of the runs, and more than one run, or most of them.
    Only an added token of the tokenizer can be one, and none of a thought: a line break that a
    template writes after each turn would end every answer at its first line.

    Args:
        examples: the training split; samples from all over it are looked at.
        model_folder: with tokenizer.json.

    Returns:
        Their ids, the most common one first; empty where turns end with none.
    """
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))
    ends: Counter[int] = Counter()
    begins = np.linspace(0, max(len(examples) - _LENGTH, 0), _STRETCHES).astype(int)
    places = np.unique((begins[:, None] + np.arange(_LENGTH)).clip(0, max(len(examples) - 1, 0)))
    for i in places.tolist() if len(examples) else []:
        example = examples[i]
        is_target_L = example.weight_L > 0
        ends_run_L = is_target_L & ~np.append(is_target_L[1:], example.truncated)
        ends.update(example.input_ids_L[ends_run_L].tolist())
    added = {
        entry["id"]
        for entry in tokenizer.get("added_tokens", [])
        if not _OF_THOUGHTS.search(entry["content"])
    }
    least = max(2, ends.total() / 100)
    most = max(ends.values(), default=0)
    return [
        token for token, n in ends.most_common() if token in added and (n == most or n >= least)
    ]


def findings(inputs: Inputs, tally: Tally, folder: Path) -> dict[str, Any]:
    """What was found in the rows beside the counts of the summary: findings.json.

    It holds nothing that a run could change, so that runs share it by the cache: names and paths
    are those of the run that prepared the data. `posttrain_dist.prepare.data_report` makes of it
    what a run shows.

    Args:
        folder: as for `summarise`.

    Returns:
        files: one object a file: path, split, source, format, rows, rejected, left_out.
        num_rows: rows that were checked.
        turns: rows that are trained turn by turn, as `TurnCost` has it.
        failed: check -> number of rows that fail it, and the places of the first ones.
        rejected: the first rows that could not be used.
        examples: channel -> conversations, with their tokens as text; those with `answers` end
            before these.
    """
    return {
        "files": [
            {
                "path": path,
                "split": inputs.sets[index].split,
                "source": inputs.sets[index].name,
                "format": inputs.readers[index].format.name,
                "rows": rows,
                "rejected": rejected,
                "left_out": left_out,
            }
            for path, (index, rows, rejected, left_out) in tally.rows_of_file.items()
        ],
        "num_rows": tally.num_rows,
        "turns": asdict(tally.turns),
        "failed": {
            name: {"failed": failed, "rows": tally.failed_places.get(name, [])}
            for name, failed in sorted(tally.failed.items())
        },
        "rejected": [asdict(rejected) for rejected in tally.rejected],
        "examples": _examples(inputs, tally, folder),
    }


def _examples(inputs: Inputs, tally: Tally, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Some conversations of each channel, read back from the arrays that are trained on."""
    row_S = tally.rows_of_samples()
    sides = {name: np.load(folder / f"{name}.npy") for name in ("train", "eval")}
    samples = Examples.open(folder, "all", tally.channels)
    found: dict[str, list[dict[str, Any]]] = {}
    for channel, row, place in tally.shown.values():
        first = int(np.searchsorted(row_S, row))
        if first == len(row_S) or row_S[first] != row:
            continue  # nothing is left of the row
        split = next((name for name, side in sides.items() if first in side), "left out")
        behind = int(np.searchsorted(row_S, row, "right"))
        shown = _shown([samples[i] for i in range(first, behind)], inputs)
        found.setdefault(channel, []).append({"where": place, "split": split, **shown})
    return found


def _shown(examples: list[Example], inputs: Inputs) -> dict[str, Any]:
    """The first sample of a row, whole; of units with answers the first prompt and all answers."""
    if "role_S" not in examples[0].extra:
        path = examples[:1]
        for example in examples[1:]:  # the first of those that follow another
            if example.parent != path[-1].sample_id:
                break
            path.append(example)
        return _sample(joined(path), inputs)
    found = _sample(examples[0], inputs)
    answers = [each for each in examples if int(each.extra["role_S"]) >= 0]
    found["answers"] = [
        {
            "role": int(answer.extra["role_S"]),
            "value": float(answer.extra["value_S"]),
            "margin": float(answer.extra["margin_S"]),
            "truncated": answer.truncated,
            **_sample(answer, inputs),
        }
        for answer in answers[:MAX_ANSWERS]
    ]
    found["supervised"] = sum(answer["supervised"] for answer in found["answers"])
    return found


def _sample(example: Example, inputs: Inputs) -> dict[str, Any]:
    return {
        "tokens": len(example.input_ids_L),
        "supervised": int(np.count_nonzero(example.weight_L)),
        "pieces": pieces(example.input_ids_L, example.weight_L, inputs.tokenizer),
    }
