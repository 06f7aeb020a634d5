"""A model that is loaded, warmed up and at work."""

from contextlib import ExitStack

from srdeploy.serve.runtime import Runtime
from srdeploy.serve.scheduling.lanes import Lanes
from srdeploy.serve.scheduling.plan import Plan
from srdeploy.serve.scheduling.planner import usual_images
from srdeploy.serve.scheduling.scheduler import Scheduler
from srdeploy.serve.scheduling.sessions import Source, open_sessions

WARM_UP_RUNS = 2


class LoadedModel:
    """The sessions of a plan, and the lanes that use them."""

    def __init__(self, scheduler: Scheduler, source: Source, plan: Plan) -> None:
        """Loads the model and runs it a few times. Raises UserError where it can't be run."""
        self.source = source
        self.plan = plan
        with ExitStack() as stack:
            sessions = stack.enter_context(open_sessions(source, plan.shared))
            lone: list[Runtime] = []
            if plan.lone is not None:
                lone = stack.enter_context(open_sessions(source, plan.lone))
            for runtime in (*sessions, *lone):
                for _ in range(WARM_UP_RUNS):
                    runtime.run(usual_images(runtime, 1))
            self._stack = stack.pop_all()
        self.runtime = sessions[0]
        """One of the sessions, to ask what it is."""
        self.lanes = Lanes(scheduler, sessions, plan, lone[0] if lone else None)

    def close(self) -> None:
        """Runs what was submitted, and frees the model."""
        self.lanes.close()
        self._stack.close()
