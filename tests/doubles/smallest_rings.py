"""Plans whose rings are all as small as they can be: the least lookahead, and the most waits."""

from collections.abc import Iterator
from functools import partial

from offload.enable import make_plan
from offload.planning.planner import Planner, plan
from offload.planning.rings import Rings


class SmallestRings(Planner):
    """Tries the last of all attempts alone."""

    device_rings = ((1, 1),)

    def attempts(self) -> Iterator[Rings]:
        *_, smallest = super().attempts()
        yield smallest


plan_smallest = partial(plan, planner=SmallestRings)
make_smallest_plan = partial(make_plan, planner=SmallestRings)
"""For `start(plan_of=)`."""
