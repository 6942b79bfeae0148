"""Entry point: ``python -m verl.trainer.siop.main data.train_files=… [any verl or algorithm.siop_* override]``."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.siop.plugin import require_registered
from verl.trainer.siop.preflight import check_before_start, check_overrides
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device
from verl.utils.siop.errors import SiopConfigError, SiopError


class SiopTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
    """verl's task runner, in whose process the ``siop`` trainer is registered before it is looked up."""

    def run(self, config: DictConfig) -> None:
        require_registered()
        import verl.trainer.siop.trainer  # noqa: F401  (registers trainer_mode=siop)

        super().run(config)


def record_config(config: DictConfig) -> None:
    """Write the resolved configuration beside the checkpoints, as ``config.yaml``; an evaluation writes none."""
    if not config.trainer.get("val_only", False):
        folder = Path(config.trainer.default_local_dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)


@hydra.main(config_path="config", config_name="siop_trainer", version_base=None)
def _run(config: DictConfig) -> None:
    try:
        require_registered()
        auto_set_device(config)
        check_before_start(config)
        validate_config(
            config=config,
            use_reference_policy=need_reference_policy(config),
            use_critic=need_critic(config),
        )
        record_config(config)
        OmegaConf.resolve(config)  # here, where the user's environment is; a cluster's workers have another
        run_ppo(config, task_runner_class=ray.remote(num_cpus=1)(SiopTaskRunner))
    except (SiopError, ray.exceptions.RayTaskError) as error:
        # Ray's wrapper is also an instance of what it wraps, and its text is the whole remote traceback.
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if not isinstance(cause, SiopError):
            raise
        sys.exit(f"error: {cause}")


def main() -> None:
    try:
        check_overrides(sys.argv[1:])
    except SiopConfigError as error:
        sys.exit(f"error: {error}")
    _run()


if __name__ == "__main__":
    main()
