"""A composed run, simulated."""

from __future__ import annotations

from prl.compose.compose import Composition
from prl.providers import RolloutScheduler
from prl.simulate.assumptions import Assumptions
from prl.simulate.figures import Figures
from prl.simulate.loop import Clock, Simulation


def simulate(composition: Composition, assumptions: Assumptions, *, steps: int) -> Figures:
    """What `steps` optimizer steps would come to; RunError when the scheduler lets the run stand still.

    The scheduler is the one that the run's plugin builds; its clock is the simulation's.
    """
    run = composition.run
    assumptions = assumptions.completed(composition)

    def build(clock: Clock) -> RolloutScheduler:
        scheduler: RolloutScheduler = composition.build(run.scheduler, run.rollouts.groups_per_step, clock)
        return scheduler

    simulation = Simulation(
        build,
        rollouts=run.rollouts,
        workload=assumptions.workload(run),
        cluster=assumptions.cluster(run),
        steps=steps,
        seed=run.run.seed,
    )
    simulation.run()
    return simulation.figures()
