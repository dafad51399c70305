"""What the fused output head refuses, and what its message names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from posttrain_kernels import VocabShard, linear_cross_entropy


def int64(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_N": int64(4, value=11)}, r"labels_N holds 11, outside \[0, 11\)"),
        ({"labels_N": int64(4, value=-1)}, "labels_N holds -1, .*only -100 means no label"),
        ({"labels_N": int64(3)}, r"labels_N must be \[4\], it is \[3\]"),
        ({"labels_N": torch.zeros(4)}, "labels_N must be int64"),
        ({"channel": int64(4, value=2)}, r"channel holds 2, outside \[0, 2\)"),
        ({"channel": int64(3)}, r"channel must be \[4\]"),
        ({"num_channels": 0}, "num_channels must be at least 1"),
        ({"supervised": int64(4, value=6)}, "supervised holds 6"),
        ({"supervised": None}, r"labels_N must be \[6\]"),
        ({"token_weight": torch.ones(5)}, "token_weight must be"),
        ({"denominator": 0.0}, "denominator is 0, but some token has a weight"),
        ({"denominator": float("nan")}, "denominator must be"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"weight_VD": torch.zeros(11, 2)}, r"\[6, 3\] and \[11, 2\]"),
        ({"weight_VD": torch.zeros(11, 3).bfloat16()}, "weight_VD is torch.bfloat16"),
        ({"weight_VD": torch.zeros(11, 3).half()}, "weight_VD is torch.float16"),
        ({"hidden_TD": int64(6, 3)}, "hidden_TD is torch.int64; use bfloat16"),
        ({"denominator": torch.ones(2)}, "denominator must be one number"),
        ({"z_loss": -1.0}, "z_loss must be"),
        ({"logit_scale": float("inf")}, "logit_scale must be"),
        ({"shard": VocabShard(3, 13)}, "11 rows from 3 do not lie in a vocabulary of 13"),
        ({"impl": "fast"}, "impl must be one of auto"),
        ({"chunk_rows": 0}, "chunk_rows must be"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden_TD": torch.zeros(6, 3),
        "weight_VD": torch.zeros(11, 3),
        "labels_N": int64(4),
        "supervised": int64(4),
        "token_weight": torch.ones(4),
        "channel": int64(4),
        "num_channels": 2,
        "denominator": 4.0,
    }
    assert float(linear_cross_entropy(**good).loss) == pytest.approx(2.3978953)  # log 11
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})
