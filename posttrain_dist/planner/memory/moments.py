"""The moments of AdamW as `engine/blockwise.py` keeps them: of 32 or 8 bits, paged or not.

8 bits (Dettmers et al., arXiv:2110.02861): a byte for each number, and for each block of 256 its
largest magnitude; tensors of fewer than 4096 numbers keep 32 bits. Paged (arXiv:2305.14314): in
unified memory, which bitsandbytes 0.50 takes for tensors of 100,000 numbers or more.
"""

from __future__ import annotations

from posttrain_dist.planner.job import Job

WIDE = 4
BLOCK = 256
_LEAST_8_BIT, _LEAST_PAGED = 4096, 100_000


def device_moments(job: Job, size: int) -> int:
    """Bytes that both moments of a tensor of `size` numbers take on the device, and stay there."""
    codes, magnitudes = _moments(job, size)
    return magnitudes if _paged(job, size) else codes + magnitudes


def host_moments(job: Job, size: int) -> int:
    """The same of what the driver moves to the host when the GPU is full."""
    return _moments(job, size)[0] if _paged(job, size) else 0


def _moments(job: Job, size: int) -> tuple[int, int]:
    """(bytes of the numbers, bytes of their blocks' magnitudes) of both."""
    if job.optimizer.state_bits == 8 and size >= _LEAST_8_BIT:
        return 2 * size, 2 * WIDE * -(-size // BLOCK)
    return 2 * WIDE * size, 0


def _paged(job: Job, size: int) -> bool:
    return job.optimizer.paged and job.on_gpu and size >= _LEAST_PAGED
