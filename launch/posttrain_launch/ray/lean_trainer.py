"""Ray Train without what this project has no use for; imported only where private names are used.

Each part that is left out is a process of its own, which takes 2 s of a CPU to import Ray Train and
Ray Data, and most of them are waited for.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

UNUSED_CALLBACKS = (
    # Hands Ray Data sets to the workers, of which there are none.
    "DatasetsCallback",
    # Removes the placement group of a controller that died. Ray removes it when the job ends, and
    # ours ends with its controller. Without a dashboard it also floods the log.
    "PlacementGroupCleanerCallback",
)


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer with fewer processes."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ not in UNUSED_CALLBACKS]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        # The controller asks an actor of Ray Data that shares out an autoscaler's nodes; on a Ray
        # that has none it starts one first. `place` has seen that the nodes are there, and the
        # placement group asks an autoscaler by itself.
        for request in ("_send", "_maybe_send", "_cancel"):
            setattr(given.get("scaling_policy"), f"{request}_resource_request", _nothing)
        return super()._initialize_and_run_controller(**given)


def _nothing() -> None:
    """What the scaling policy asks for."""
