"""The packed prefix tree, and the scores of the transformers engine against plain full-sequence forward passes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from fixtures_scorer import MAX_MODEL_LEN, VOCAB_SIZE, tiny_causal_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.siop.engines.base import Probe, RolloutQuery
from verl.utils.siop.engines.prefix_tree import build_prefix_tree, encode_path
from verl.utils.siop.engines.transformers_engine import TransformersEngine
from verl.utils.siop.errors import InvalidRequest, SiopConfigError


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_causal_lm()


def prefixes(paths):
    return {tuple(path[:length]) for path in paths for length in range(1, len(path) + 1)}


def ids(*tokens):
    return np.array(tokens, dtype=np.int64)


def query(prompt, response, boundaries, *probes):
    return RolloutQuery(ids(*prompt), ids(*response), boundaries, [Probe(ids(*t), s, e) for t, s, e in probes])


def paths_of(rollouts):
    """All token paths that have to be computed for a request: contexts with their references but the last token."""
    return [
        [*rollout.prompt_ids, *rollout.response_ids[:boundary], *probe.token_ids[: probe.end - 1]]
        for rollout in rollouts
        for boundary in rollout.boundaries
        for probe in rollout.probes
    ]


@torch.inference_mode()
def plain_support(model, rollouts):
    """The definition: one full sequence per (boundary, reference)."""
    support = []
    for rollout in rollouts:
        rows = []
        for boundary in rollout.boundaries:
            context = np.concatenate([rollout.prompt_ids, rollout.response_ids[:boundary]])
            row = []
            for probe in rollout.probes:
                full = torch.from_numpy(np.concatenate([context, probe.token_ids]))
                logprobs = model(input_ids=full[None], use_cache=False).logits[0].log_softmax(-1)
                at = torch.arange(len(context) + probe.start, len(context) + probe.end)
                row.append(float(logprobs[at - 1, full[at]].mean()))
            rows.append(row)
        support.append(rows)
    return support


def flat(support):
    return [score for rows in support for row in rows for score in row]


# Few distinct tokens, one of them with several bytes, so that paths share prefixes and their order is tested.
TOKEN = st.sampled_from([0, 1, 2, 258, 300])


@given(st.lists(st.lists(TOKEN, max_size=7), max_size=12))
def test_tree_has_one_node_per_distinct_prefix_and_each_sees_its_own_path_only(paths):
    tree = build_prefix_tree([encode_path(path) for path in paths], [np.arange(len(path)) for path in paths])
    assert len(tree) == len(tree.depth) == len(tree.end) == len(prefixes(paths))
    nodes = np.arange(len(tree))
    for path, rows in zip(paths, tree.rows, strict=True):
        assert tree.tokens[rows].tolist() == path
        assert tree.depth[rows].tolist() == list(range(len(path)))
        if path:
            last = rows[-1]
            assert nodes[(nodes <= last) & (last < tree.end)].tolist() == rows.tolist()


@st.composite
def requests(draw):
    prompts = draw(st.lists(st.lists(TOKEN, min_size=1, max_size=5), min_size=1, max_size=2))
    tokens = draw(st.lists(st.lists(TOKEN, min_size=1, max_size=5), min_size=1, max_size=3))
    references = [(reference, 0, len(reference)) for reference in tokens]
    # One that is a prefix of another, and one of a single token.
    references += [(tokens[0][:1], 0, 1), (tokens[0], len(tokens[0]) - 1, len(tokens[0]))]
    rollouts = []
    for _ in range(draw(st.integers(1, 4))):
        response = draw(st.lists(TOKEN, max_size=12))
        turns = draw(st.integers(1, 6))
        cuts = draw(st.lists(st.integers(0, len(response)), min_size=turns, max_size=turns))
        chosen = draw(st.lists(st.sampled_from(references), min_size=1, max_size=4))
        rollouts.append(query(draw(st.sampled_from(prompts)), response, [0, *cuts], *chosen))
    if draw(st.booleans()):
        rollouts.append(rollouts[0])
    return rollouts


@settings(max_examples=25, deadline=None)
@given(requests(), st.sampled_from([1, 3, 7, 256]))
def test_scores_are_those_of_full_sequences(model, rollouts, chunk_tokens):
    engine = TransformersEngine(model, chunk_tokens=chunk_tokens, self_test=False)
    result = engine.support(rollouts)
    expected = plain_support(model, rollouts)
    assert [[len(row) for row in rows] for rows in result.support] == [[len(row) for row in rows] for rows in expected]
    np.testing.assert_allclose(flat(result.support), flat(expected), atol=1e-4)
    paths = paths_of(rollouts)
    assert result.computed_tokens == len(prefixes(paths))
    assert result.requested_tokens == sum(
        len(rollout.prompt_ids) + boundary + len(probe.token_ids)
        for rollout in rollouts
        for boundary in rollout.boundaries
        for probe in rollout.probes
    )


def test_many_reference_rows_are_split_into_bounded_blocks_of_logits(model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, VOCAB_SIZE, n).tolist()  # noqa: E731
    rollouts = [query(draw(6), draw(9), [0, 4, 9], (draw(8), 1, 7), (draw(5), 0, 5)) for _ in range(3)]
    engine = TransformersEngine(model, self_test=False)
    engine._max_rows = 4
    widths = []

    def spy(module, args, kwargs, output):
        widths.append(output.logits.shape[1])

    hook = model.register_forward_hook(spy, with_kwargs=True)
    try:
        support = engine.support(rollouts).support
    finally:
        hook.remove()
    assert max(widths) == 4
    np.testing.assert_allclose(flat(support), flat(plain_support(model, rollouts)), atol=1e-4)


def test_the_weights_of_the_moment_are_used(model):
    rollouts = [query([1, 2], [3, 4, 5], [0, 2, 3], ([6, 7, 8], 1, 3))]
    other = tiny_causal_lm(seed=1)
    engine = TransformersEngine(other)
    before = flat(engine.support(rollouts).support)
    other.load_state_dict(model.state_dict())
    after = flat(engine.support(rollouts).support)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1
    np.testing.assert_allclose(after, flat(plain_support(model, rollouts)), atol=1e-4)


def test_longest_rollout_is_scored_and_a_longer_one_is_an_error_of_its_own(model):
    engine = TransformersEngine(model)
    good = query([1], [2] * 9, [0, 9], ([3, 4], 0, 2))
    fits = query([1], [2] * (MAX_MODEL_LEN - 3), [0, MAX_MODEL_LEN - 3], ([3, 4], 0, 2))
    longer = query([1], [2] * (MAX_MODEL_LEN - 2), [0, MAX_MODEL_LEN - 2], ([3, 4], 0, 2))
    result = engine.support([longer, good, longer, fits])
    np.testing.assert_allclose(
        flat([result.support[1], result.support[3]]), flat(plain_support(model, [good, fits])), atol=1e-4
    )
    assert result.support[0] == result.support[2] == []
    message = f"too long: {MAX_MODEL_LEN + 1} tokens .*max_model_len is {MAX_MODEL_LEN}$"
    assert sorted(result.errors) == [0, 2] and all(re.match(message, error) for error in result.errors.values())
    alone = engine.support([good, fits])
    assert alone.errors == {}
    assert (result.computed_tokens, result.requested_tokens) == (alone.computed_tokens, alone.requested_tokens)
    only = engine.support([longer])
    assert (only.support, list(only.errors), only.computed_tokens) == ([[]], [0], 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (query([1], [2, 3], [0, 3], ([4], 0, 1)), r"rollouts\[0\]\.boundaries\[1\] = 3"),
        (query([1], [2, 3], [-1], ([4], 0, 1)), r"boundaries\[0\] = -1"),
        (query([1], [2, 3], [0], ([4], 0, 2)), r"references\[0\]"),
        (query([1], [2, 3], [0], ([4], 1, 1)), r"references\[0\]"),
        (query([], [2, 3], [0], ([4], 0, 1)), r"references\[0\]\.start = 0 with an empty prompt"),
        (query([1, VOCAB_SIZE], [2, 3], [0], ([4], 0, 1)), rf"prompt_ids\[1\] = {VOCAB_SIZE}"),
        (query([1], [2, 3], [0], ([4, -1], 0, 1)), r"references\[0\]\.token_ids\[1\] = -1"),
    ],
)
def test_bad_input_is_named(model, bad, message):
    with pytest.raises(InvalidRequest, match=message):
        TransformersEngine(model, self_test=False).support([bad])


def test_empty_request(model):
    result = TransformersEngine(model, self_test=False).support([])
    assert (result.support, result.computed_tokens, result.requested_tokens) == ([], 0, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_layers_that_are_not_full_attention_are_refused_by_name(overrides, message):
    # transformers falls back to full attention where it does not know the type, so only the configuration can tell.
    model = tiny_causal_lm()
    config = type(model.config)(**{**model.config.to_dict(), "layer_types": None, **overrides})
    model.config = config
    with pytest.raises(SiopConfigError, match=f"qwen3.*{message}"):
        TransformersEngine(model)


def test_a_model_that_ignores_positions_fails_the_self_test():
    model = tiny_causal_lm()
    forward = type(model).forward

    class Deaf(type(model)):
        def forward(
            self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, logits_to_keep=0, **kw
        ):
            return forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                **kw,
            )

    model.__class__ = Deaf
    with pytest.raises(SiopConfigError, match="self-test"):
        TransformersEngine(model)


def test_missing_model_is_named(tmp_path):
    with pytest.raises(SiopConfigError, match=str(tmp_path)):
        TransformersEngine.from_pretrained(str(tmp_path))
