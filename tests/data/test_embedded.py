"""The embedded data set, and the text that the small base model is made from."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import make_embedded
import make_preferences
import make_tiny_base
import pytest
from embedded_heldout import contains_heldout
from tiny_tokenizer import SPECIAL, train_tokenizer

from posttrain_dist.data import embedded
from posttrain_dist.errors import DataError


@cache
def rows(split: str) -> list[dict[str, Any]]:
    """The committed rows of one split."""
    text = embedded.split_path(split).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def pretraining(library_part: int = 12) -> list[dict[str, str]]:
    """Every twelfth module of the library, or all of it; and a fiftieth of the generated text."""
    return clean_rows(library_part)


@cache
def clean_rows(library_part: int) -> list[dict[str, str]]:
    every_module = make_tiny_base.stdlib_text.modules

    def sampled() -> Iterator[Any]:
        return islice(every_module(), 0, None, library_part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_tiny_base.stdlib_text, "modules", sampled)
        return make_tiny_base.clean_rows(share=0.02)


def turns(row: dict[str, Any]) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


# ------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("split", embedded.SHA256)
def test_digest_is_the_pinned_one(split: str) -> None:
    data = (embedded.FOLDER / f"{split}.jsonl").read_bytes()
    assert hashlib.sha256(data).hexdigest() == embedded.SHA256[split]
    assert embedded.split_path(split) == embedded.FOLDER / f"{split}.jsonl"


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    data = (embedded.FOLDER / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_bytes(data)
    assert embedded.split_path("train", tmp_path) == tmp_path / "train.jsonl"
    (tmp_path / "train.jsonl").write_bytes(data.replace(b"59", b"60", 1))
    with pytest.raises(DataError, match=r"train\.jsonl: the file was changed"):
        embedded.split_path("train", tmp_path)
    with pytest.raises(DataError, match=r"heldout\.jsonl: the file is not there"):
        embedded.split_path("heldout", tmp_path)
    with pytest.raises(DataError, match="no split 'test'"):
        embedded.split_path("test")


def test_channels_of_both_natures_in_both_splits() -> None:
    assert len(embedded.CHANNELS) == len(set(embedded.CHANNELS)) >= 5
    for split, least, most in (("train", 300, 1000), ("heldout", 40, 60)):
        count = Counter(row["task_type"] for row in rows(split))
        assert set(count) == set(embedded.CHANNELS)
        assert all(least <= number <= most for number in count.values()), count
        for row in rows(split):
            assert (row.get("check") == "exact") == (row["task_type"] in embedded.FIXED_CHANNELS)
    assert sum((embedded.FOLDER / f"{s}.jsonl").stat().st_size for s in embedded.SHA256) < 1.5e6


def test_no_prompt_twice_and_none_in_both_splits() -> None:
    prompts = [turns(row)[0] for split in ("train", "heldout") for row in rows(split)]
    assert len(prompts) == len(set(prompts))


def test_no_open_answer_in_both_splits() -> None:
    train, heldout = (
        {turns(row)[1] for row in rows(split) if row["task_type"] in embedded.OPEN_CHANNELS}
        for split in ("train", "heldout")
    )
    assert train.isdisjoint(heldout)


# ------------------------------------------------------------------------- the preferences


@cache
def preferences(split: str) -> list[dict[str, Any]]:
    return rows(f"preferences_{split}")


def test_preferences_come_out_the_same_again(tmp_path: Path) -> None:
    expected = {split: sha for split, sha in embedded.SHA256.items() if "preferences" in split}
    assert make_preferences.write(tmp_path) == expected


def test_preferences_are_of_two_natures_and_the_better_answer_is_right() -> None:
    for split, least in (("train", 200), ("heldout", 40)):
        count = Counter(row["task_type"] for row in preferences(split))
        assert set(count) == set(embedded.PREFERENCE_CHANNELS)
        assert min(count.values()) >= least
        for row in preferences(split):
            is_fixed = row["task_type"] in embedded.FIXED_CHANNELS
            assert (row.get("check") == "exact") == is_fixed
            if is_fixed:
                right = solve(row["task_type"], row["prompt"])
                assert row["chosen"] == right != row["rejected"]


def test_neither_length_nor_the_prompt_tells_which_answer_is_better() -> None:
    """Nor does a single split: what goes by length is wrong on a third of each channel at least."""
    for channel in embedded.PREFERENCE_CHANNELS:
        found = [row for row in preferences("train") if row["task_type"] == channel]
        shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in found)
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in found)
        assert max(shorter, longer) < 0.66 * len(found), channel


def test_no_prompt_of_preferences_in_both_splits_nor_of_training_in_the_held_out_rows() -> None:
    train, heldout = ({row["prompt"] for row in preferences(s)} for s in ("train", "heldout"))
    prompts = {split: {turns(row)[0] for row in rows(split)} for split in ("train", "heldout")}
    assert train.isdisjoint(heldout | prompts["heldout"])
    assert heldout.isdisjoint(prompts["train"])
    assert len(train) + len(heldout) == len(preferences("train")) + len(preferences("heldout"))


# ----------------------------------------------------------------------------- the answers


def solve(channel: str, prompt: str) -> str:
    """The right answer, worked out from the prompt alone and not as the generator does it."""
    if channel == "arithmetic":
        left, sign, right = re.fullmatch(r"What is (\d+) ([+-]) (\d)\?", prompt).groups()  # type: ignore[union-attr]
        number = int(left)
        for _ in range(int(right)):
            number += {"+": 1, "-": -1}[sign]
        return str(number)
    question, _, given = prompt.partition("?" if channel == "extract" else ":")
    given = given.strip()
    if channel == "count":
        asked = question.split()[3]
        return str(len(given.split()) - len([c for c in given.split() if c != asked]))
    if channel == "extract":
        return re.search(rf"\b{question.split()[-1]}=(\w+)", given)[1]  # type: ignore[index]
    if channel == "reverse":
        return given[::-1]
    assert channel == "sort"
    return "".join(digit * given.count(digit) for digit in "0123456789")


@pytest.mark.parametrize("channel", embedded.FIXED_CHANNELS)
def test_every_fixed_answer_is_right(channel: str) -> None:
    for split in ("train", "heldout"):
        for prompt, answer in (turns(row) for row in rows(split) if row["task_type"] == channel):
            assert solve(channel, prompt) == answer, prompt


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_generator_makes_the_committed_fixed_rows(split: str) -> None:
    lines = (embedded.FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert make_embedded.fixed_rows(split) == [line for line in lines if '"check"' in line]


# -------------------------------------------------------------------- the pretraining text


def test_contains_heldout_sees_every_row_in_any_form() -> None:
    for row in rows("heldout"):
        prompt, answer = turns(row)
        assert contains_heldout(f"Some text before. {prompt}\nand after."), prompt
        if row["task_type"] in embedded.OPEN_CHANNELS:
            words = answer.split()
            folded = f"# {' '.join(words[:2])}\n    # {' '.join(words[2:])}"
            assert contains_heldout(folded), answer
    by_channel = {row["task_type"]: turns(row)[0] for row in rows("heldout")}
    left, sign, right = by_channel["arithmetic"].removeprefix("What is ").rstrip("?").split()
    letters = by_channel["reverse"].partition(": ")[2]
    record = by_channel["extract"].partition("? ")[2]
    assert contains_heldout(f">>> {left}{sign}{right}")
    assert contains_heldout(f"reverse {letters[::-1]} ->")
    assert contains_heldout("{" + record.replace("=", ": ").replace(";", ",") + "}")


def test_contains_heldout_lets_near_misses_pass() -> None:
    by_channel = {row["task_type"]: turns(row) for row in rows("heldout")}
    digits = by_channel["sort"][0].partition(": ")[2]
    letters = by_channel["reverse"][0].partition(": ")[2]
    sum_ = by_channel["arithmetic"][0].removeprefix("What is ").rstrip("?")
    record = by_channel["extract"][0].partition("? ")[2]
    for other in (f"{digits}00", f"9{sum_}", f"{letters} {letters[0]}", f"{record}x"):
        assert not contains_heldout(other), other
    assert not contains_heldout(by_channel["docstring"][1].rsplit(" ", 1)[0])


def fixed_inputs(text: str) -> set[str]:
    """Every sum, long number, row of letters and record written in `text`, found word by word."""

    def kind(word: str) -> str:
        if len(word) == 1 and word.islower():
            return "letter"
        return "field" if re.fullmatch(r"\w+=\w+;?", word) else ""

    words = re.sub(r"([\n?]|<\|\w+\|>)", r" \1 ", text).split(" ")
    found = {word for word in words if word.isdigit() and len(word) > 2}
    for left, sign, right in zip(words, words[1:], words[2:], strict=False):
        if sign in "+-" and left.isdigit() and right.isdigit():
            found.add(f"{left} {sign} {right}")
    for name, run in groupby(words, kind):
        piece = " ".join(run)
        if name and " " in piece:
            found.add(piece)
    return found


@pytest.mark.parametrize("library_part", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_pretraining_text_holds_no_heldout_row(library_part: int) -> None:
    found = pretraining(library_part)
    names = Counter(row["task_type"] for row in found)
    assert names["drill"] > 400 and names["chat"] > 80 and names["library"] > 5000 / library_part
    text = "\n".join(row["text"] for row in found)
    one_line = " ".join(text.replace("#", " ").split())
    inputs = fixed_inputs(text)
    assert len([piece for piece in inputs if "=" in piece]) > 100  # records are found at all
    for row in rows("heldout"):
        prompt, answer = turns(row)
        if row["task_type"] in embedded.OPEN_CHANNELS:
            assert answer not in one_line
            assert " ".join(prompt.partition("\n")[2].split()) not in one_line
        else:
            assert len(fixed_inputs(prompt)) == 1, prompt
            assert inputs.isdisjoint(fixed_inputs(prompt)), prompt


def test_drills_hold_every_skill_and_chat_none() -> None:
    drills = "\n".join(r["text"] for r in pretraining() if r["task_type"] == "drill")
    chats = [r["text"] for r in pretraining() if r["task_type"] == "chat"]
    for pattern in (r"^\d+ [+-] \d = \d+$", r"^count . in ", r" \| \w+ -> ", "^reverse ", "^sort "):
        assert len(re.findall(pattern, drills, re.M)) > 100, pattern
    asked = [turns(row)[0] for row in rows("train") if "check" in row]
    openings = {prompt.split()[0] + " " + prompt.split()[1] for prompt in asked}
    assert not [chat for chat in chats for opening in openings if opening in chat]


def test_drawing_is_the_same_again() -> None:
    first, again = (make_tiny_base.drill(random.Random("x")) for _ in range(2))
    assert first == again


# --------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((row["text"] for row in pretraining()[:3000]), 1024).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer_gives_back_any_bytes(tokenizer: Any) -> None:
    rng = random.Random(0)
    texts = [
        "".join(map(chr, range(256))),
        "  a\t\n\n b ",
        "don 't , stop .",
        "naïve 漢字 🙂\u200b",
    ]
    texts += ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(50)) for _ in range(50)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_splits_digits_and_spaced_letters(tokenizer: Any) -> None:
    assert tokenizer.tokenize("20863") == list("20863")
    assert len(tokenizer("d f k m")["input_ids"]) == 4
    assert [len(tokenizer(token)["input_ids"]) for token in SPECIAL] == [1] * len(SPECIAL)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.bos_token is None
    assert tokenizer("x")["input_ids"] == tokenizer.convert_tokens_to_ids(["x"])


def test_template_prompt_is_a_prefix_of_the_training_text(tokenizer: Any) -> None:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = [{"role": "system", "content": "s"}, *turn, *turn]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert whole == (
        "<|system|>s<|end|><|user|>a<|end|><|assistant|>b<|end|>"
        "<|user|>a<|end|><|assistant|>b<|end|>"
    )
    for end in (2, 4):
        asked = tokenizer.apply_chat_template(
            talk[:end], tokenize=False, add_generation_prompt=True
        )
        assert whole.startswith(asked + "b<|end|>")
        ids = [tokenizer(text)["input_ids"] for text in (asked, whole)]
        assert ids[1][: len(ids[0])] == ids[0]


def test_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    for row in (rows("train")[0], rows("train")[-1]):
        out = tokenizer.apply_chat_template(
            row["messages"], return_assistant_tokens_mask=True, return_dict=True
        )
        marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
        assert tokenizer.decode(marked) == turns(row)[1] + "<|end|>"
        changes = sum(a != b for a, b in pairwise(out["assistant_masks"]))
        assert changes == 1


def test_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
