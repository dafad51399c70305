"""Rows with answers, for the page and the terminal: what is compared, and how long it is."""

from __future__ import annotations

from typing import Any

from posttrain_dist.report.numbers import UNKNOWN, whole

_OTHER = 1  # role of an answer to another prompt
LONGER = 1.25  # times as long, from which on lengths are worth a word


def names_of_answers(answers: list[dict[str, Any]]) -> list[str]:
    """What each answer of a row is, by what it is worth beside the others."""
    own = [answer for answer in answers if answer["role"] != _OTHER]
    has_labels = len(own) < len(answers) or len(own) == 1
    words = ("undesirable", "desirable") if has_labels else ("rejected", "chosen")
    is_pair = len(own) <= 2 and {answer["value"] for answer in own} <= {0.0, 1.0}
    names = []
    for answer in answers:
        if answer["role"] == _OTHER:
            names.append("answer to another prompt")
        elif is_pair:
            names.append(words[int(answer["value"])])
        else:
            names.append(f"worth {answer['value']:g}")
        if answer.get("margin"):
            names[-1] += f" by {answer['margin']:g}"
        if answer.get("truncated"):
            names[-1] += ", cut"
    return names


def is_better(answer: dict[str, Any], answers: list[dict[str, Any]]) -> bool:
    """Whether an answer is worth as much as the best of its row, and another one less."""
    values = [each["value"] for each in answers if each["role"] != _OTHER]
    return (
        bool(values) and answer["role"] != _OTHER and min(values) < answer["value"] == max(values)
    )


def comparison_rows(report: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """One row a channel that has answers: comparisons, and mean tokens of the better and worse."""
    found = []
    for name, counts in ((report.get("splits") or {}).get(split) or {}).items():
        if not (counts.get("better") or counts.get("worse")):
            continue
        better, worse = (_mean(counts, side) for side in ("better", "worse"))
        ratio = better / worse if better and worse else None
        found.append(
            {
                "name": name,
                "comparisons": whole(counts["comparisons"]),
                "better": UNKNOWN if better is None else f"{better:,.1f}",
                "worse": UNKNOWN if worse is None else f"{worse:,.1f}",
                "ratio": UNKNOWN if ratio is None else f"{ratio:.2f}",
                "biased": ratio is not None and not 1 / LONGER < ratio < LONGER,
            }
        )
    return found


def answer_warnings(report: dict[str, Any]) -> list[str]:
    """A line for each training channel whose better answers differ in length from the others, and
    one where labels are all of one kind.
    """
    biased = [
        f"{row['name']}: better answers have {row['better']} tokens on average, the others "
        f"{row['worse']} ({row['ratio']} times): length alone may be learned"
        for row in comparison_rows(report, "train")
        if row["biased"]
    ]
    return biased + _one_kind(list(report.get("splits", {}).get("train", {}).values()))


def _one_kind(channels: list[dict[str, Any]]) -> list[str]:
    """Of labels, that one of the two kinds is nowhere."""
    if any(counts.get("comparisons") for counts in channels):
        return []
    better, worse = (sum(counts.get(k, 0) for counts in channels) for k in ("better", "worse"))
    if bool(better) == bool(worse):
        return []
    there, missing = ("true", "undesirable") if better else ("false", "desirable")
    return [f"every label is {there}: without {missing} answers there is nothing to tell apart"]


def of_sample(units: list[dict[str, Any]], sample: int) -> str:
    """What a sample of a pack is beside the others; empty for one of its own."""
    if sample >= len(units):
        return ""
    unit = units[sample]
    if unit["follows"] is None:
        is_prompt = any(other["follows"] == sample for other in units)
        return "prompt" if is_prompt else ""
    kind = "answer of another row" if unit.get("role") == _OTHER else "answer"
    worth = (
        "" if unit.get("role") == _OTHER or "value" not in unit else f", worth {unit['value']:g}"
    )
    return f"{kind} to sample {unit['follows']}{worth}"


def _mean(counts: dict[str, Any], side: str) -> float | None:
    return counts[f"{side}_tokens"] / counts[side] if counts.get(side) else None
