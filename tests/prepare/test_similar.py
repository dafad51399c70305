"""Near duplicates against brute force: Jaccard of all runs of 5 tokens, all pairs of rows."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posttrain_dist.prepare.similar import (
    BANDS,
    Bands,
    near_duplicates,
    near_leaks,
    signature,
    signatures,
)

TOKENS = 32_000


def runs_of(row: np.ndarray) -> set[tuple[int, ...]]:
    ids = row.tolist()
    return {tuple(ids[i : i + 5]) for i in range(len(ids) - 4)}


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    a, b = runs_of(one), runs_of(other)
    return len(a & b) / len(a | b)


def pairs(low: float, high: float, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and changed copies of them with low <= J <= high: cut, replaced, inserted tokens."""
    random = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        row = random.integers(0, TOKENS, random.integers(30, 400))
        aim = random.uniform(low, high)
        edits = max(1, round(len(row) * (1 - aim) / (1 + aim) / 5))  # one ends 5 runs, adds 5
        copy = row.tolist()
        for at in sorted(random.choice(len(row), edits, replace=False).tolist(), reverse=True):
            new = int(random.integers(0, TOKENS))
            copy[at : at + 1] = [[new], [new, copy[at]], []][int(random.integers(3))]
        if random.random() < 0.3:  # the same beginning, another end
            kept = round(2 * aim / (1 + aim) * len(row))
            copy = [*row[:kept].tolist(), *random.integers(0, TOKENS, len(row) - kept).tolist()]
        other = np.array(copy)
        if low <= jaccard(row, other) <= high:
            found.append((row, other))
    return found


def share_found(some: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of pairs laid end to end as rows of one data set, how many give one near duplicate."""
    rows = [row for pair in some for row in pair]
    found = near_duplicates(signatures(rows).T, np.arange(len(rows)))
    assert not found[0::2].any()  # the first of a pair is none
    return float(found[1::2].mean())


def test_alike_pairs_are_found() -> None:
    assert share_found(pairs(0.95, 0.97, 500, seed=1)) >= 0.98
    assert share_found(pairs(0.97, 0.999, 300, seed=2)) >= 0.99


def test_unlike_pairs_are_not() -> None:
    assert share_found(pairs(0.25, 0.30, 500, seed=3)) <= 0.005
    assert share_found(pairs(0.0, 0.25, 200, seed=4)) == 0


@pytest.mark.parametrize("low", [0.48, 0.68, 0.78, 0.88])
def test_the_curve_is_that_of_minhash(low: float) -> None:
    some = pairs(low, low + 0.04, 500, seed=round(100 * low))
    expected = np.mean([1 - (1 - jaccard(*pair) ** 9) ** BANDS for pair in some])
    error = np.sqrt(expected * (1 - expected) / len(some))
    assert abs(share_found(some) - expected) < 4 * error


def test_a_signature_is_that_of_the_set_of_runs() -> None:
    random = np.random.default_rng(5)
    row = random.integers(0, TOKENS, 40)
    twice = np.concatenate([row, row])
    bridge = np.concatenate([row, row[:4]])  # holds each run of `twice` once
    assert runs_of(twice) == runs_of(bridge)
    assert signature(twice).tolist() == signature(bridge).tolist()
    assert signature(row).tolist() != signature(row[::-1].copy()).tolist()
    for dtype in (np.int64, np.uint32):
        assert signature(row.astype(dtype)).tolist() == signature(row.astype(np.int32)).tolist()


def test_a_long_row_is_taken_in_parts_that_do_not_show() -> None:
    row = np.random.default_rng(6).integers(0, TOKENS, 30_000)
    changed = row.copy()
    changed[[3, 4095, 4096, 4099, 29_999]] = 1  # also where one part ends
    assert jaccard(row, changed) > 0.998
    assert (signature(row) == signature(changed)).mean() >= 0.5
    assert not (signature(row) == signature(row[10_000:])).all()
    # The runs that cross from one part to the next count too.
    rolled = np.concatenate([row[5000:], row[:5000], row[5000:5004]])
    assert runs_of(row) <= runs_of(rolled) | runs_of(row[4996:5004])
    assert (signature(rolled) == signature(row)).mean() >= 0.5


def test_short_rows_are_hashed_whole() -> None:
    rows = [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [2, 1], [1, 2, 3, 5], [1, 2, 3, 4, 5]]
    seen = np.array([signature(np.array(row, np.int32)) for row in rows])
    assert seen.dtype == np.uint64 and seen.shape == (8, BANDS)
    for band in seen.T:
        assert len(set(band.tolist())) == 8
    again = signature(np.array([1, 2, 3], np.int64))
    assert again.tolist() == seen[3].tolist()


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from posttrain_dist.prepare.similar import signature;"
        "np.random.seed(9); print(signature(np.arange(300) ** 2 % 32000).tolist())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    here = str(signature(np.arange(300) ** 2 % 32000).tolist())
    assert told == [here, here]


@pytest.mark.parametrize("seed", range(40))
def test_near_duplicates_and_leaks_are_those_of_all_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    count, values = int(random.integers(0, 60)), int(random.integers(2, 200))
    bands = random.integers(0, values, (count, BANDS)).astype(np.uint64)
    keys = random.integers(0, max(1, values // 3), count)
    expected = [
        any((bands[j] == bands[i]).any() and keys[j] != keys[i] for j in range(i))
        for i in range(count)
    ]
    assert near_duplicates(bands.T, keys).tolist() == expected
    as_bytes = [bytes([key]) * 32 for key in keys.tolist()]
    assert near_duplicates(bands.T, as_bytes).tolist() == expected
    cut = int(random.integers(0, count + 1))
    leaks = [any((t == h).any() for t in bands[:cut]) for h in bands[cut:]]
    train = np.arange(count) < cut
    assert near_leaks(bands.T, train, ~train).tolist() == leaks


def test_bands_are_compared_each_with_its_own() -> None:
    one = np.arange(BANDS, dtype=np.uint64)[None]
    other = one[:, ::-1].copy() + np.uint64(0)
    assert BANDS % 2 == 0 and not (one == other).any()
    both, train = np.concatenate([one, other]).T, np.array([True, False])
    assert not near_leaks(both, train, ~train).any()
    assert not near_duplicates(both, [1, 2]).any()


def test_exact_copies_are_not_near_duplicates() -> None:
    row = np.random.default_rng(8).integers(0, TOKENS, 200)
    changed = row.copy()
    changed[100] = (changed[100] + 1) % TOKENS
    rows = [row, row, changed, row, changed]
    assert jaccard(row, changed) == pytest.approx(191 / 201)
    found = signatures(rows)
    assert (found[0] == found[2]).any()
    assert near_duplicates(found.T, [7, 7, 8, 7, 8]).tolist() == [False, False, True, True, True]


def test_many_rows_at_once_have_the_signatures_of_each() -> None:
    random = np.random.default_rng(5)
    lengths = [0, 1, 4, 5, 6, *random.integers(0, 300, 60), 4096, 4100, 3, 9000, 4099, 5]
    rows = [random.integers(0, 40, length).astype(np.int32) for length in lengths]
    assert signatures(rows).tolist() == [signature(row).tolist() for row in rows]
    assert signatures([]).shape == (0, BANDS)


def test_bands_come_back_from_the_disk_and_leave_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    parts = [random.integers(0, 1 << 63, (n, BANDS)).astype(np.uint64) for n in (3, 0, 1, 500)]
    with contextlib.closing(Bands(tmp_path)) as bands:
        for part in parts:
            bands.append(part)
        for _ in range(2):
            assert np.array_equal(np.stack(list(bands)), np.concatenate(parts).T)
        bands.append(parts[0])
        assert np.array_equal(np.stack(list(bands)), np.concatenate([*parts, parts[0]]).T)
    assert list(tmp_path.iterdir()) == []
