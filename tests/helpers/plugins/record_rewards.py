"""Loaded into every verl process of a training run (VERL_USE_EXTERNAL_MODULES) to see what the estimator receives.

Each call of the ``siop`` estimator is saved to ``RECORD_DIR`` before it computes anything.
"""

import functools
import os
import time

import torch
from verl.trainer.ppo import core_algos
from verl.trainer.siop import plugin  # noqa: F401  (registers the estimator)

_upstream = core_algos.ADV_ESTIMATOR_REGISTRY["siop"]

if not hasattr(_upstream, "records"):

    @functools.wraps(_upstream)
    def record(token_level_rewards, response_mask, *args, **kwargs):
        advantages, returns = _upstream(token_level_rewards, response_mask, *args, **kwargs)
        call = {
            "rewards": token_level_rewards.clone(),
            "mask": response_mask.clone(),
            "index": list(kwargs["index"]),
            "advantages": advantages.clone(),
            "returns": returns.clone(),
        }
        torch.save(call, os.path.join(os.environ["RECORD_DIR"], f"{time.time_ns()}.pt"))
        return advantages, returns

    record.records = True  # type: ignore[attr-defined]
    core_algos.ADV_ESTIMATOR_REGISTRY["siop"] = record
