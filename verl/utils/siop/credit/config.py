"""The ``algorithm.siop_*`` keys as a validated dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.utils.siop.credit.registry import BASELINES, CREDIT_METHODS, Registry
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.turn_utils import BOUNDARY_MODES

# Of the texts around a reference: from the chat template (:class:`~verl.utils.siop.credit.probe.Prober`).
AUTO = "auto"
# TRACE's epsilon, in nats: what is missing of a reference that is certain (``siop_gain=gap``).
GAP_OFFSET = 0.1
# Keys of the first release that belong to the scorer here.
RELEASED = {
    "siop_nli_model": "the scorer holds the NLI model; start it with SIOP_NLI_MODEL",
    "siop_nli_device": "the scorer holds the NLI model; start it with SIOP_NLI_DEVICE",
}


def finite_number(value: object) -> float | None:
    """The value as a float; None of what is no real number (a bool is none), not finite or beyond any float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _choice(*values: str) -> Any:
    return field(default=values[0], metadata={"choices": lambda: values})


def _registered(default: str, registry: Registry[Any]) -> Any:
    # The names are read when a value is checked: a user's module may register more.
    return field(default=default, metadata={"choices": registry.names})


def _number(default: float, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class SiopConfig:
    """The ``algorithm.siop_*`` keys, validated when built. The first value of each choice is the default.

    ``siop_reward_mode`` and ``siop_baseline`` take the names that are registered
    (:mod:`verl.utils.siop.credit.registry`), those of the module ``siop_import`` among them: it is imported first, in
    every process that reads the keys.

    Raises:
        SiopConfigError: an unknown key, a wrong type, a value out of range or an impossible combination; the message
            names the key, the value and what is allowed.
    """

    siop_reward_mode: str = _registered("process", CREDIT_METHODS)
    siop_use_gold_ref: bool = False
    siop_advantage_mode: str = _choice("turn_level", "broadcast")
    siop_enable_two_pass: bool = True
    siop_baseline: str = _registered("leave_one_out", BASELINES)
    siop_scorer_noise: float = _number(1e-5, 0.0)
    siop_return: str = _choice("sum", "min")
    siop_turn_weight: float = _number(0.3, 0.0, above=True)
    siop_boundary: str = _choice(*BOUNDARY_MODES)
    siop_gain: str = _choice("peak", "prob", "log", "gap")
    siop_lambda: float = _number(0.5, 0.0, 1.0)
    siop_vote: str = _choice("count", "informed")
    siop_eta: float = _number(1.0, 0.0)
    siop_evidence: str = _choice("mean", "max")
    siop_num_refs: int = _number(3, 1)
    siop_epsilon: float = _number(1e-8, 0.0, above=True)
    siop_consensus_terminal: str = _choice("frequency", "support")
    siop_outcome_weight: float = _number(0.0, 0.0)
    siop_strict_entailment: bool = True
    siop_probe_opening: bool = True
    siop_reference_prefix: str = AUTO
    siop_reference_suffix: str = AUTO
    siop_scorer: str = _choice("server", "policy")
    siop_scorer_url: str = "http://127.0.0.1:8390"
    siop_scorer_timeout_s: float = _number(600.0, 0.0, above=True)
    siop_streaming: bool = True
    siop_on_scorer_error: str = _choice("raise", "drop_group")
    siop_on_nothing_learnt: str = _choice("stop", "warn")
    siop_import: str = ""

    def __new__(cls, **values: Any) -> SiopConfig:
        # Before the generated __init__ can answer an unknown key with a bare TypeError.
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key, value in values.items():
            if key in RELEASED:
                raise SiopConfigError(f"unknown key {key}={value!r}: {RELEASED[key]}")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SiopConfigError(f"unknown key {key}={value!r}{hint} Allowed keys: {', '.join(sorted(known))}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._import_module()
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _validated(spec, getattr(self, spec.name)))
        if not self.siop_scorer_url.startswith(("http://", "https://")):
            raise SiopConfigError(
                f"siop_scorer_url={self.siop_scorer_url!r} is not allowed; an address starts with http:// or https://"
            )
        for key in ("siop_reference_prefix", "siop_reference_suffix"):
            value = getattr(self, key)
            if value.strip().lower() == AUTO != value:
                raise SiopConfigError(f"{key}={value!r} is not allowed; choose {AUTO}, or a text of your own")
        if self.siop_use_gold_ref and self.siop_reward_mode != "process":
            raise SiopConfigError(
                f"siop_use_gold_ref=True is not allowed with siop_reward_mode={self.siop_reward_mode!r}: the gold "
                "answer replaces the clusters that this mode counts. Use siop_reward_mode='process' with it"
            )
        if not self.siop_probe_opening and self.siop_boundary == "observation":
            raise SiopConfigError(
                "siop_probe_opening=False has no effect with siop_boundary='observation', where every context ends as "
                "the policy's turn begins; leave it out"
            )
        if self.siop_return != "sum" and self.siop_baseline in ("turn_group", "trace"):
            raise SiopConfigError(
                f"siop_return={self.siop_return!r} is not allowed with siop_baseline={self.siop_baseline!r}, which "
                "sums the rewards of the turns itself. Use siop_return='sum' with it"
            )

    @property
    def needs_scorer(self) -> bool:
        """Whether the method asks for clusters, evidence or support at all, and reads answers."""
        return self.siop_use_gold_ref or self.siop_reward_mode not in CREDIT_METHODS.without_scorer

    @property
    def measures_support(self) -> bool:
        """Whether the method asks for the probability of references; a method of the user's own may."""
        if self.siop_reward_mode == "query_consensus":
            return self.siop_consensus_terminal == "support"
        return self.needs_scorer and self.siop_reward_mode not in ("majority_binary", "cluster_frequency")

    @property
    def outcome_advantage(self) -> bool:
        """Whether all turns of a rollout have one advantage, GRPO's of the sum of its rewards."""
        return self.siop_advantage_mode == "broadcast" or not self.siop_enable_two_pass

    @property
    def reward_noise(self) -> float:
        """Standard deviation of the scorer's noise in a turn reward.

        ``siop_scorer_noise``, which is one in log p and bounds the one in p and in log(p + eps). A gap's logarithm
        makes up to 1 / 0.1 times as much of it. 0 where no support enters the rewards: they are exact.
        """
        if not self.measures_support:
            return 0.0
        return self.siop_scorer_noise / (GAP_OFFSET if self.siop_gain == "gap" else 1.0)

    def _import_module(self) -> None:
        if self.siop_import and isinstance(self.siop_import, str):
            try:
                if self.siop_import.startswith("."):
                    raise ImportError("a module by its full name")
                importlib.import_module(self.siop_import)
            except ImportError as error:
                raise SiopConfigError(
                    f"siop_import={self.siop_import!r} is not allowed; choose a module that Python can import "
                    f"(PYTHONPATH): {error}"
                ) from error

    @classmethod
    def from_algorithm(cls, algorithm: Mapping[Any, Any] | None) -> SiopConfig:
        """The ``siop_*`` keys of verl's ``algorithm`` section; those that are missing take their default.

        Args:
            algorithm: a DictConfig, a dict or verl's AlgoConfig; None gives the defaults.

        Raises:
            SiopConfigError: see the class.
        """
        keys = [str(key) for key in algorithm or () if str(key).startswith("siop_")]
        return cls(**{key: algorithm[key] for key in keys}) if algorithm is not None else cls()


def _validated(spec: dataclasses.Field[Any], value: Any) -> Any:
    """The value, a number as its declared type; SiopConfigError if it is not allowed."""

    def refuse(allowed: str) -> SiopConfigError:
        return SiopConfigError(f"{spec.name}={value!r} is not allowed; choose {allowed}")

    if spec.type == "bool":
        if not isinstance(value, bool):
            raise refuse("true or false")
    elif "choices" in spec.metadata:
        choices = spec.metadata["choices"]()
        if not isinstance(value, str) or value not in choices:
            raise refuse(("one of " if len(choices) > 1 else "") + ", ".join(choices))
    elif spec.type == "str":
        if not isinstance(value, str):
            raise refuse("a text")
    else:
        low, high, above = (spec.metadata[name] for name in ("low", "high", "above"))
        kind = "a whole number" if spec.type == "int" else "a number"
        wanted = f"{kind} {'above' if above else 'from'} {low}" + (f" to {high}" if math.isfinite(high) else "")
        number = finite_number(value)
        if number is None or not low <= number <= high or (above and number == low):
            raise refuse(wanted)
        if spec.type == "int" and not isinstance(value, numbers.Integral):
            raise refuse(wanted)
        return int(number) if spec.type == "int" else number
    return value
