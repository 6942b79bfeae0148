// A rollout as a test: the question's lines of the dump, and the credit that they must have.

// JSON's escapes are Python's, too.
const literal = (value) => JSON.stringify(JSON.stringify(value));

export function testCase({ rollouts, settings }, rollout) {
  if (!settings) throw new Error("the dump holds no settings of this training");
  const { adv_estimator: estimator, use_kl_in_reward: penalty } = settings.algorithm;
  if (estimator !== "siop") throw new Error(`adv_estimator=${estimator} takes no turn rewards`);
  if (penalty) throw new Error("use_kl_in_reward changes the rewards by what is not in the dump");
  const line = rollouts.find((one) => one.uid === rollout.uid);
  // None are zeros, see recompute.
  const rewards = line.turn_rewards?.length ? line.turn_rewards : rollout.turns.filter((turn) => !turn.before).map(() => 0);
  return `"""Credit of rollout ${line.session} of a question of step ${line.step}, from a dump."""

import json

import pytest
from verl.utils.siop.inspector.recompute import recompute
from verl.utils.siop.inspector.schema import DumpedSettings, parse_rollout

SETTINGS = json.loads(${literal(settings)})
LINES = [
${rollouts.map((one) => `    ${literal(one)},`).join("\n")}
]


def test_turn_rewards() -> None:
    rollouts = [parse_rollout(line, "case") for line in LINES]
    # Advantages may be scaled by the whole batch, of which this is one question.
    credit = recompute(rollouts, DumpedSettings(**SETTINGS))[${JSON.stringify(line.uid)}]
    assert credit["rewards"] == pytest.approx(${JSON.stringify(rewards)}, abs=1e-6)
`;
}
