"""What a run says of its own settings when it starts: nothing is wrong, but it should be seen."""

from __future__ import annotations

from posttrain_dist.config.run_config import RunConfig
from posttrain_dist.engine import AdamW

LOW = 3.0  # a rate below the tuning's own by this factor is one of full tuning, by habit


def learning_rate_line(config: RunConfig) -> str:
    """Which learning rate a completed config trains with, and whose choice that is."""
    optimizer, tuning = config.optimizer, config.tuning
    assert isinstance(optimizer, AdamW) and optimizer.lr is not None
    own = config.objective.learning_rate(tuning.default_lr)
    under = "" if config.objective.lr_factor == 1.0 else f" under {config.objective.name}"
    whose = f"of tuning {_name(config)}{under}" if optimizer.lr == own else "as set"
    return f"learning rate {optimizer.lr:g} ({whose})"


def settings_line(config: RunConfig, *, trained: int, parameters: int) -> str:
    """What is trained, with which effect, how fast."""
    parts = [f"{trained:,} of {parameters:,} parameters are trained ({trained / parameters:.2%})"]
    parts += [config.tuning.effect] if config.tuning.effect else []
    return "; ".join([*parts, learning_rate_line(config)])


def warnings(config: RunConfig, *, on_cpu: bool) -> list[str]:
    """Lines for the terminal: settings that train, and train badly or otherwise than they say.

    Args:
        on_cpu: whether the run has no GPU.
    """
    optimizer, tuning = config.optimizer, config.tuning
    assert isinstance(optimizer, AdamW) and optimizer.lr is not None
    found = []
    own = config.objective.learning_rate(tuning.default_lr)
    if not tuning.whole_model and optimizer.lr * LOW <= own:
        found.append(
            f"optimizer.lr is {optimizer.lr:g}, a rate of full tuning: tuning={_name(config)} "
            f"learns at about {own:g}, which optimizer.lr=null takes, and hardly "
            "moves at this one"
        )
    if optimizer.paged and on_cpu:
        found.append("optimizer.paged is true, and there is no GPU: nothing is paged on a CPU")
    return found


def _name(config: RunConfig) -> str:
    return str(config.to_dict()["tuning"]["kind"])
