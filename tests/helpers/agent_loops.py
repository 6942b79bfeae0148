"""An agent loop as verl's worker makes it, around a scripted model."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import DictConfigWrap


def agent_loop(cls: type, config: Any, tokenizer: Any, model: Any, **options: Any) -> Any:
    """A loop of this class; ``options`` are its own."""
    return cls(
        trainer_config=DictConfigWrap(config),
        server_manager=model,
        tokenizer=tokenizer,
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(config.data),
        hf_model_type="qwen3",
        **options,
    )
