"""The data report in the terminal: what stands where, in colour and without, at any width."""

import re

import pytest

from posttrain_dist.report.data.data_text import counts_text, data_text, formats_line

HIDDEN = "\ud800\x00\x1b[31m\u202e"
SPELLED = "<U+D800><U+0000><U+001B>[31m<U+202E>"
LONG = "a long name of a channel [bold]that is no markup[/bold]"
START, END = "<|start|>", "<|end|>"


def conversation(question: str, answer: str, weight: float = 1.0) -> list[list]:
    asked = [[START, 0.0, True], ["user\n", 0.0, False], [question, 0.0, False], [END, 0.0, True]]
    words = [[word, weight, False] for word in re.findall(r"\s?\S+|\s", answer)]
    return [*asked, ["\n", 0.0, False], *words, [END, weight, True], ["\n", 0.0, False]]


def counts(k: int) -> dict:
    return {
        "rows": 1234 * k,
        "samples": 1000 * k,
        "tokens": 12_345_678 * k,
        "supervised": 3_456_789 * k,
        "truncated": 0,
        "dropped": 7 * k,
        "duplicates": 0,
        "near_duplicates": 11 * k,
        "lengths": [[16, 0], [32, 10], [64, 40], [128, 5]],
    }


PIECES = [[*p, s] for s in (0, 1) for p in conversation(f"Ask {s}", "Tell me")]
REPORT = {
    "name": "first",
    "settings": {"max_length": 64},
    "files": [{"path": "a", "rejected": 34}],
    "channels": ["code", LONG],
    "splits": {
        "train": {"code": counts(1), LONG: counts(2)},
        "eval": {"code": counts(3)},
    },
    "duplicates_moved": 31,
    "checks": [
        {"name": "fine", "level": "error", "explain": "E0", "fix": "", "checked": 9, "failed": 0},
        {
            "name": "prefix",
            "level": "error",
            "explain": "Because of " + "reasons " * 30,
            "fix": "template.form=turns",
            "checked": 5023,
            "failed": 153,
            "rows": [f"f.jsonl:{k}" for k in range(100, 120)],
        },
    ],
    "rejected": [
        {
            "file": "f.jsonl",
            "line": k,
            "byte": 1000 * k,
            "field": "a.b",
            "what": f"w{HIDDEN}",
            "fix": "x",
        }
        for k in range(1, 21)
    ],
    "sources": {"code": {"asked": 0.5, "rows_share": 0.49, "token_share": 0.61, "passes": 1.3}},
    "examples": {
        "code": [
            {"where": "f.jsonl:3", "split": "train", "tokens": 11, "supervised": 4, "pieces": p}
            for p in (
                conversation("Reverse ab", "ba  is\tit \n"),
                conversation("x" * 300, f"half{HIDDEN}", 0.5),
            )
        ],
    },
    "batch": {"tokens": len(PIECES), "samples": 2, "pieces": PIECES},
}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [50, 80, 140])
def test_tables_fit_and_are_whole(width: int) -> None:
    text = data_text(REPORT, width, False, conversations=0)
    assert max(map(len, text.splitlines())) <= width
    flat = re.sub(r"\s+", " ", text)
    assert flat.startswith("✗ first: Training does not start on this data: 1 error")
    wanted = ["1,234", "37,037,034" if width >= 110 else "37.0M", "28.0%", "none cut, none dup."]
    for word in (*wanted, "31 held-out rows", "fine 9 checked", "50.0%"):
        assert word in flat
    assert LONG in flat if width > 100 else "[bold]" in flat
    assert "prefix 153 of 5,023 fail" in flat and "and 148 more" in flat
    assert "To fix it: template.form=turns" in flat
    assert "f.jsonl:10 (byte 10,000)" in flat and "f.jsonl:11 " not in flat
    assert f"a.b w{SPELLED}; x" in flat and "and 24 more" in flat
    assert "conversations" not in flat and "E0" not in flat


def test_columns_belong_to_their_heads() -> None:
    lines = data_text(REPORT, 140, False, conversations=0).splitlines()
    heads = next(line for line in lines if line.startswith("training"))
    row = next(line for line in lines if line.startswith("code"))
    expected = {
        "rows": "1,234",
        "samples": "1,000",
        "tokens": "12,345,678",
        "supervised": "3,456,789",
        "of tokens": "28.0%",
        "dropped": "7",
        "near dup.": "11",
    }
    for head, cell in expected.items():  # both end in the same column
        end = re.search(rf"(?<=  ){head}(?=  |$)", heads).end()
        assert row[:end].split()[-1] == cell
    lengths = next(line for line in lines if line.startswith("code") and "▂█▁" in line)
    assert lengths.split() == ["code", "64", "128", "▂█▁"]


def test_supervised_text_stands_in_brackets() -> None:
    text = data_text(REPORT, 80, False)
    assert "\x1b" not in text and "\ud800" not in text and "\x00" not in text
    head = "── code · f.jsonl:3 · training · 11 tokens · 4 supervised\n"
    assert f"{head}{START}user\nReverse ab{END}\n⟦ba  is\tit \n{END}⟧\n" in text
    weighted = f"⟦×0.5 half{SPELLED}{END}⟧"  # noqa: RUF001
    assert f"{head}{START}user\n{'x' * 300}{END}\n{weighted}\n" in text
    count = len(PIECES) // 2
    batch = f"one packed batch: {2 * count} tokens of 64 ({2 * count / 64:.1%}), 2 samples"
    assert batch in text
    for sample in (0, 1):
        span = f"[{sample * count}, {(sample + 1) * count})"
        head = f"── sample {sample} · tokens {span} · 3 supervised\n"
        assert f"{head}{START}user\nAsk {sample}{END}\n⟦Tell me{END}⟧\n" in text


def test_colours_stand_on_what_is_trained_on() -> None:
    text = data_text(REPORT, 80, True)
    green, learned, masked = "\x1b[1;32m", "\x1b[1;35m", "\x1b[2;35m"
    assert f"{green}ba\x1b[0m\x1b[1;33m··\x1b[0m{green}is\x1b[0m" in text
    assert f"{green}Tell me\x1b[0m{learned}{END}\x1b[0m" in text
    assert f"{masked}{START}\x1b[0m" in text and f"\x1b[2mAsk 1\x1b[0m{masked}{END}" in text
    assert "\x1b[31m<U" not in text and f"half{SPELLED}" in plain(text)
    assert "⟦" not in text
    without = data_text(REPORT, 80, False, conversations=0)
    coloured = plain(data_text(REPORT, 80, True, conversations=0))
    assert [line.rstrip() for line in coloured.splitlines()] == without.splitlines()


def test_as_many_conversations_as_asked_for() -> None:
    assert data_text(REPORT, 80, False).count("── code") == 2
    one = data_text(REPORT, 80, False, conversations=1)
    assert one.count("── code") == 1 and one.count("── sample") == 2


def test_any_part_may_be_missing_or_empty() -> None:
    assert data_text({}, 80, False).startswith("! No check was made\n")
    for key in REPORT:
        for report in (
            {k: v for k, v in REPORT.items() if k != key},
            REPORT | {key: type(REPORT[key])()},
            {key: REPORT[key]},
        ):
            text = data_text(report, 80, False)
            assert ("── code" in text) == bool(report.get("examples"))
            assert ("rejected rows: " in text) == bool(
                report.get("rejected") or report.get("files")
            )


def test_what_a_run_begins_with() -> None:
    report = REPORT | {"splits": {"train": {"code": counts(1)}, "eval": {"code": counts(3)}}}
    lines = counts_text(report | {"near_leaks": 2}).splitlines()
    assert lines[0].split() == [
        *("channel", "split", "rows", "tokens", "supervised", "truncated", "dropped"),
        "duplicates",
    ]
    assert [line.split() for line in lines[2:4]] == [
        ["code", "train", "1,234", "12,345,678", "3,456,789", "0", "7", "0"],
        ["code", "held-out", "3,702", "37,037,034", "10,370,367", "0", "21", "0"],
    ]
    assert lines[4:] == [
        "31 held-out rows also stood in train: left out",
        "2 held-out rows are much like a row of train",
        "34 rows could not be used: see data_report.html",
    ]


def test_the_formats_that_rows_were_read_in() -> None:
    files = [{"source": "a", "format": "messages"}, {"source": "b", "format": "alpaca"}]
    named, found = {"format": "messages"}, {"format": "auto"}
    one = formats_line({"files": files[:1], "settings": named})
    assert one == "format of the rows: messages"
    both = formats_line({"files": files, "settings": found})
    assert both == "format of the rows: a: messages, b: alpaca, recognised from the first rows"
