"""How often to write a checkpoint, and what share of the time is then of use.

J. W. Young, "A first order approximation to the optimum checkpoint interval" (1974);
J. T. Daly, "A higher order estimate of the optimum checkpoint interval" (2006).
"""

from __future__ import annotations

import math


def checkpoint_interval(checkpoint_s: float, failure_s: float) -> float:
    """Seconds of training between two checkpoints, of least expected time (Daly, equation 37).

    tau = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C, and M where C is 2 M or more

    Args:
        checkpoint_s: C, that one takes.
        failure_s: M, the mean time between failures of the whole run.
    """
    if checkpoint_s >= 2 * failure_s:
        return failure_s
    ratio = checkpoint_s / (2 * failure_s)
    root = math.sqrt(2 * checkpoint_s * failure_s)
    return root * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def effective_share(
    interval_s: float, checkpoint_s: float, failure_s: float, restart_s: float
) -> float:
    """Expected share of the time that trains, with exponential failures (Daly, equation 20).

    tau / (M exp(R / M) (exp((tau + C) / M) - 1))

    Args:
        interval_s: tau, between two checkpoints.
        checkpoint_s: C; failure_s: M.
        restart_s: R, from a failure until training goes on where its checkpoint was.
    """
    if interval_s <= 0:
        return 0.0
    exponent = (interval_s + checkpoint_s + restart_s) / failure_s
    if exponent > 500:
        return 0.0
    waiting = math.exp(restart_s / failure_s) * math.expm1((interval_s + checkpoint_s) / failure_s)
    return interval_s / (failure_s * waiting)
