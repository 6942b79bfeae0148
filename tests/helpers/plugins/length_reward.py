"""``siop_import=length_reward``: a credit method that needs no scorer."""

from verl.utils.siop.credit.batch import CreditBatch
from verl.utils.siop.credit.registry import register_credit
from verl.utils.siop.credit.rollouts import GroupRewards


@register_credit("length", needs_scorer=False)
async def length(batch: CreditBatch) -> GroupRewards:
    """The last turn earns a hundredth of a point for each token that the policy wrote."""
    return batch.result(
        {
            index: [0.0] * (len(item.turns) - 1) + [sum(item.rollout.response_mask) / 100]
            for index, item in enumerate(batch.parsed)
        }
    )
