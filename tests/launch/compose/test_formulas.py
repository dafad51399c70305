"""Relations between keys, and ranges in equal ratios: values, and what is refused."""

from __future__ import annotations

import math

import pytest
from posttrain_launch.cli import main
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.formulas.arithmetic import evaluate, keys_of, parse_formula
from posttrain_launch.compose.formulas.log_range import log_range, write_out_log_range
from posttrain_launch.compose.problems import check_sweep, compose_checked

from posttrain_dist.errors import ConfigError

VALUES = {"tuning.rank": 12, "tuning.alpha": 1.5, "seed": 7}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*tuning.rank", 24),
        ("2 * (tuning.rank + seed) - 1", 37),
        ("tuning.rank // 5 ** 1", 2),
        ("tuning.rank % 5", 2),
        ("-tuning.alpha / 2", -0.75),
        ("tuning.rank ** 0.5", math.sqrt(12)),
        ("1e-3 * tuning.rank", 0.012),
    ],
)
def test_a_formula_has_the_value_of_arithmetic(text, value):
    formula = parse_formula(text)
    assert formula is not None
    assert evaluate(formula, VALUES) == pytest.approx(value, rel=1e-15)
    assert set(keys_of(formula)) == {key for key in VALUES if key in text}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "seed if seed else 1",
        "seed[0]",
        "seed and 1",
        "seed < 2",
        "lambda: seed",
        "'a' * seed",
        "True * seed",
        "seed @ seed",
        "2 * 3",
        "/data/chat.jsonl",
        "1e-5",
        "(" * 5000 + "seed" + ")" * 5000,
    ],
)
def test_what_is_no_arithmetic_over_keys_is_no_formula(text):
    assert parse_formula(text) is None


@pytest.mark.parametrize(
    "text", ["seed / 0", "9 ** 9 ** seed", "(0 - seed) ** 0.5", "1e308 * seed"]
)
def test_a_result_that_is_no_number_is_refused(text):
    formula = parse_formula(text)
    assert formula is not None
    with pytest.raises(ArithmeticError):
        evaluate(formula, VALUES)


def test_a_relation_takes_the_values_of_its_run():
    with Composer() as composer:
        for words, rank, alpha in (
            (["tuning.rank=8", "tuning.alpha=2*tuning.rank"], 8, 16.0),
            (["tuning.alpha=2*tuning.rank", "tuning.rank=32"], 32, 64.0),
            (["tuning.alpha=64", "tuning.rank=tuning.alpha//3"], 21, 64.0),
            (["tuning.rank=seed", "seed=5", 'tuning.alpha="3*(tuning.rank+1)"'], 5, 18.0),
        ):
            composed = compose_checked(composer, ["tuning=lora", "model.path=x", *words])
            assert (composed.config.tuning.rank, composed.config.tuning.alpha) == (rank, alpha)
            assert all("*" not in word and "/" not in word for word in composed.overrides)


def test_text_that_looks_like_a_relation_stays_text():
    with Composer() as composer:
        composed = compose_checked(composer, ["model.path=model.path", "data.train=data/seed"])
    assert composed.config.model.path == "model.path"
    assert composed.config.data.train == "data/seed"


def test_a_relation_without_a_value_names_key_and_way_out():
    cases = [
        (["tuning.alpha=2*tuning.rnk"], "tuning.alpha", "did you mean tuning.rank?"),
        (["tuning.alpha=tuning.dropout/0"], "tuning.alpha", "division by zero"),
        (["tuning.rank=tuning.alpha/5"], "tuning.rank", "is not a whole number"),
        (["tuning.rank=2*tuning.alpha", "tuning.alpha=2*tuning.rank"], "tuning.", "itself"),
        (["tuning.alpha=2*tuning.targets"], "tuning.alpha", "tuning.targets, which has none"),
    ]
    with Composer() as composer:
        for words, key, says in cases:
            with pytest.raises(ConfigError, match=says) as caught:
                compose_checked(composer, ["tuning=lora", "model.path=x", *words])
            assert caught.value.where.startswith(key)
            assert caught.value.fix


def test_a_relation_is_checked_for_every_trial_of_a_grid():
    words = ["tuning=lora", "model.path=x", "tuning.rank=tuning.alpha//2,tuning.alpha/3"]
    with Composer() as composer:
        check_sweep(composer, [*words[:2], "tuning.rank=3,4", "tuning.alpha=2*tuning.rank"])
        with pytest.raises(ConfigError, match=r"with tuning.alpha=32.0 is 10.6667"):
            check_sweep(composer, words)


def test_the_ends_of_an_interval_are_values_of_their_key():
    words = ["tuning=lora", "model.path=x", "tuning.alpha=2*tuning.rank"]
    with Composer() as composer:
        check_sweep(composer, [*words, "tuning.rank=interval(4,64)"])
        with pytest.raises(ConfigError, match=r"4\.5 is not a whole number"):
            check_sweep(composer, [*words, "tuning.rank=interval(4.5,64)"])


def test_a_relation_is_printed_as_its_number(capsys):
    words = ["tuning=lora", "tuning.rank=24", "tuning.alpha=2*tuning.rank"]
    assert main(["train", *words, "--cfg", "job", "--package", "tuning"]) == 0
    assert "\nalpha: 48.0\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------- log ranges


def test_a_log_range_has_equal_ratios_and_its_ends():
    assert log_range(1e-5, 1e-3, 5) == ["1e-05", "3.162e-05", "0.0001", "0.0003162", "0.001"]
    assert log_range(8, 1, 4) == ["8", "4", "2", "1"]
    assert log_range(3, 7, 2) == ["3", "7"]


def test_a_log_range_is_written_out_and_nothing_else():
    assert write_out_log_range("optimizer.lr=logrange(1, 100, 3)") == "optimizer.lr=1,10,100"
    for word in ("name=logrange", "optimizer.lr=1e-5", "--cfg", "a=choice(logrange(1,2,2))"):
        assert write_out_log_range(word) == word


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("1e-5,1e-3", "two numbers and a count"),
        ("1e-5,1e-3,2.5", "two numbers and a count"),
        ("0,1,3", "above 0"),
        ("1,1,3", "different"),
        ("nan,1,3", "above 0"),
        ("1,2,1", "2 to 1000"),
        ("1,2,100000", "2 to 1000"),
    ],
)
def test_a_log_range_that_is_none_is_refused(inside, says):
    with pytest.raises(ConfigError, match=says) as caught:
        write_out_log_range(f"optimizer.lr=logrange({inside})")
    assert caught.value.where == "optimizer.lr"


def test_a_log_range_that_is_none_ends_the_command(capsys):
    assert main(["train", "-m", "model.path=/nowhere", "optimizer.lr=logrange(0,1,3)"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: optimizer.lr: ") and "above 0" in error
