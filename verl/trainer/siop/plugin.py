"""Entry point of the ``verl.plugins`` group: verl imports this module in every process at ``import verl``.

It registers the ``siop`` advantage estimator, the ``turn_clip`` policy loss and, if ``VERL_PLATFORM=cpu``, the CPU
platform and rollout. verl reports a plugin that fails to import at DEBUG level only, so :func:`require_registered`
checks the result and is called by the training entry point in the driver and in the trainer's process.
"""

from __future__ import annotations

from verl.utils.siop import cpu
from verl.utils.siop.errors import SiopError

if cpu.is_active():
    cpu.activate()

import verl.trainer.siop.advantage  # (registers the estimator)
import verl.trainer.siop.turn_clip  # noqa: F401  (registers the policy loss)


class PluginNotLoaded(SiopError, ImportError):
    """The verl plugin of this project did not register what it should."""


def require_registered() -> None:
    """Fail loudly unless verl knows the ``siop`` estimator (and, on the CPU platform, the ``hf_cpu`` rollout).

    Raises:
        PluginNotLoaded: naming what is missing and how to repair it.
    """
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    missing = []
    if "siop" not in ADV_ESTIMATOR_REGISTRY:
        missing.append("advantage estimator 'siop'")
    if cpu.is_active() and "hf_cpu" not in RolloutReplicaRegistry._registry:
        missing.append("rollout 'hf_cpu'")
    if missing:
        raise PluginNotLoaded(
            f"verl did not register {' and '.join(missing)}: the entry point 'siop' of the group 'verl.plugins' was "
            "not loaded. Install this project (pip install .) into the Python that runs verl, and leave "
            "VERL_USE_EXTERNAL_PLUGINS unset or at 'auto'."
        )
