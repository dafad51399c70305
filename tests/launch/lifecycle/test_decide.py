"""What follows from how the starts of a run ended."""

import itertools

import pytest
from posttrain_launch.lifecycle.decide import (
    Action,
    Cause,
    Policy,
    Start,
    highest_step,
    next_action,
    without_progress,
)
from posttrain_launch.lifecycle.exit_codes import Exit


def starts(*steps: tuple[int, int], cause: Cause = Cause.time_limit) -> list[Start]:
    """Starts by the steps of their newest checkpoints, before and after."""
    return [Start(before, after, 1, cause) for before, after in steps]


AFTER_PROGRESS = {
    Cause.finished: (Action.end, 0),
    Cause.failed: (Action.end, 1),
    Cause.bad_config: (Action.end, 2),
    Cause.stopped: (Action.end, 130),
    Cause.time_limit: (Action.requeue, 85),
    Cause.preempted: (Action.wait, 85),
    Cause.requeued: (Action.wait, 85),
    Cause.node_failure: (Action.requeue, 75),
    Cause.ray_lost: (Action.requeue, 75),
    Cause.killed: (Action.requeue, 75),
}


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_its_action_and_exit_code(cause):
    decision = next_action(starts((0, 10), cause=cause))
    assert (decision.action, decision.code) == AFTER_PROGRESS[cause]
    # Whoever reads the code alone comes to the same: it is started again, by us or by Slurm.
    assert Exit(decision.code).starts_again is (decision.action is not Action.end)


@pytest.mark.parametrize("cause", Cause)
def test_three_starts_without_progress_are_the_last(cause):
    end = {Cause.finished, Cause.failed, Cause.bad_config, Cause.stopped}
    for count in (1, 2, 3, 4):
        history = [*starts((0, 10)), *starts(*[(10, 10)] * count, cause=cause)]
        decision = next_action(history)
        assert (decision.action is Action.end) is (cause in end or count >= 3)
        if cause not in end and count >= 3:
            assert decision.code == Exit.failed
            assert f"{count} starts in a row without progress" in decision.reason
            assert "step 10" in decision.reason


def test_a_run_that_never_saved_is_named_so():
    decision = next_action(starts((0, 0), (0, 0), (0, 0), cause=Cause.killed))
    assert decision.action is Action.end
    assert "it has no checkpoint yet" in decision.reason


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ([], 0),
        ([(0, 0)], 1),
        ([(0, 1)], 0),
        ([(0, 0), (0, 0), (0, 5)], 0),
        ([(0, 5), (5, 5), (5, 6), (6, 6)], 1),
        # The checkpoint of step 100 is found damaged and reached again, time after time.
        ([(0, 100), (50, 100), (50, 100)], 2),
        # A run that a person sent on from step 100.
        ([(100, 100), (100, 90)], 2),
        ([(100, 101)], 0),
    ],
)
def test_progress_is_a_step_that_was_never_reached(steps, count):
    assert without_progress(starts(*steps)) == count


def test_progress_counted_otherwise_is_the_same():
    """All histories of four starts over three steps, against the definition in words."""
    for ends in itertools.product(range(3), repeat=4):
        steps = list(zip((0, *ends), ends, strict=False))
        fruitful = [end > max((0, *ends[:i])) for i, end in enumerate(ends)]
        newest = max((i for i, each in enumerate(fruitful) if each), default=-1)
        assert without_progress(starts(*steps)) == 3 - newest
        assert highest_step(starts(*steps)) == max(ends)


def test_a_policy_may_allow_more_or_no_restart():
    history = starts((0, 0), (0, 0), (0, 0), cause=Cause.node_failure)
    assert next_action(history, Policy(max_without_progress=4)).action is Action.requeue
    kept = next_action(starts((0, 5), cause=Cause.node_failure), Policy(requeue=False))
    assert (kept.action, kept.code) == (Action.end, 75)
    assert "not to be queued again" in kept.reason
    # Slurm starts a preempted job by itself, whatever we do.
    waits = next_action(starts((0, 5), cause=Cause.preempted), Policy(requeue=False))
    assert waits.action is Action.wait


def test_nothing_follows_from_nothing():
    with pytest.raises(ValueError, match="nothing was started"):
        next_action([])
