"""The next cheaper plan, for an update whose process comes near its budget."""

from collections.abc import Sequence

from ..memory.chain_cost import ChainCost
from ..memory.plan import Plan

NEAR = 0.98
"""The share of the budget from which on an update steps down."""


def cheaper(plan: Plan, candidates: Sequence[Plan], cost: ChainCost | None) -> Plan | None:
    """A plan that holds less: half as many stages, then what comes next among the candidates.

    Args:
        plan: the present one.
        candidates: all plans, cheapest in time first.
        cost: of the chain; None where the bundle has none.

    Returns:
        None where there is none with exact gradients left.
    """
    held = plan.held
    if held.stages:
        assert cost is not None
        return cost.holding(plan, held.stages // 2)
    ways = [(item.strategy, item.state_in_file, item.held.stride) for item in candidates]
    later = candidates[ways.index((plan.strategy, plan.state_in_file, held.stride)) + 1 :]
    following = next((item for item in later if item.exact), None)
    if following is None or not plan.exact:
        return None
    return following if cost is None else cost.holding(following, 0)
