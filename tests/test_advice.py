"""A learning rate that is full tuning's by habit is named, with the one that the tuning takes."""

from __future__ import annotations

import pytest

from posttrain_dist.config import AdamW, Full, Lora, Prompt, RunConfig, complete
from posttrain_dist.config.advice import learning_rate_line, settings_line, warnings


@pytest.mark.parametrize(
    ("tuning", "lr", "line", "warned"),
    [
        (Lora(), None, "learning rate 0.0001 (of tuning lora)", ""),
        (Lora(), 5e-5, "learning rate 5e-05 (as set)", ""),
        (Lora(), 3e-5, "learning rate 3e-05 (as set)", "optimizer.lr is 3e-05, a rate of full"),
        (Prompt(), 1e-4, "learning rate 0.0001 (as set)", "tuning=prompt learns at about 0.2"),
        (Prompt(), 0.1, "learning rate 0.1 (as set)", ""),
        (Full(), None, "learning rate 1e-05 (of tuning full)", ""),
        (Full(), 1e-8, "learning rate 1e-08 (as set)", ""),
    ],
)
def test_the_learning_rate_is_said(tuning, lr, line, warned):
    config = complete(RunConfig(tuning=tuning, optimizer=AdamW(lr=lr)))
    assert learning_rate_line(config) == line
    assert settings_line(config, trained=1, parameters=4).endswith(line)
    found = warnings(config, on_cpu=True)
    assert len(found) == bool(warned) and warned in " ".join(found)


def test_pages_need_a_gpu():
    config = complete(RunConfig(optimizer=AdamW(paged=True)))
    assert warnings(config, on_cpu=True) == [
        "optimizer.paged is true, and there is no GPU: nothing is paged on a CPU"
    ]
    assert warnings(config, on_cpu=False) == []


def test_the_first_line_says_what_is_trained_and_how_much_it_counts():
    config = complete(RunConfig(tuning=Lora(rank=64, alpha=16.0, rslora=True)))
    assert settings_line(config, trained=1_234_567, parameters=8_000_000) == (
        "1,234,567 of 8,000,000 parameters are trained (15.43%); "
        "effective scale alpha / sqrt(rank) = 2; learning rate 0.0001 (of tuning lora)"
    )
