"""What a plan knows of the data: of rows that were prepared, or nothing."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_dist.data.prepared.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """The training split of a prepared folder, in numbers.

    Attributes:
        tokens: of all samples, once.
        supervised: of these, those with a weight in the loss.
        longest: tokens of the longest sample, held-out ones included.
        heldout_tokens: of the samples that evaluation reads.
    """

    tokens: int
    supervised: int
    longest: int
    channels: int
    heldout_tokens: int

    @classmethod
    def of(cls, summary: Summary) -> DataFacts:
        """What `prepare` found and wrote."""
        train, heldout = (summary.splits.get(split, {}).values() for split in ("train", "eval"))
        return cls(
            tokens=sum(counts.tokens for counts in train),
            supervised=sum(counts.supervised for counts in train),
            longest=summary.longest,
            channels=len(summary.channels),
            heldout_tokens=sum(counts.tokens for counts in heldout),
        )
