"""The packed prefix tree, and what the transformers engine takes, refuses and keeps in memory."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring_cases import TOKEN, flat, plain_support, prefixes, query
from tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, tiny_causal_lm
from transformers import AutoConfig
from verl.utils.siop.errors import InvalidRequest, SiopConfigError
from verl.utils.siop.scorer.engines.prefix_tree import build_prefix_tree
from verl.utils.siop.scorer.engines.token_paths import encode_path
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine, check_architecture


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_causal_lm()


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


def test_logits_and_masks_stay_bounded(model):
    """The language-model head sees the rows that predict a reference token, a few at a time; a mask has the columns of
    the current path, not of the whole request."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, VOCAB_SIZE, n).tolist()  # noqa: E731
    prompt, references = draw(6), [(draw(8), 1, 7), (draw(5), 0, 5)]
    rollouts = [query(prompt, draw(60), [0, 25, 60], *references) for _ in range(12)]
    engine = TransformersEngine(model, chunk_tokens=32, self_test=False)
    engine._max_rows = 4
    head_rows, masks = [], []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda module, args: head_rows.append(args[0].shape[1])),
        model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"].shape[2:]), with_kwargs=True
        ),
    ]
    try:
        result = engine.support(rollouts)
    finally:
        for hook in hooks:
            hook.remove()
    # At the prompt's end both references are the same for all rollouts; each of the 24 later boundaries has its own.
    # A row that predicts the first token of the second reference is the context's last token.
    assert sum(head_rows) == (6 + 5) * (1 + 24)
    assert max(head_rows) <= 4
    longest = 6 + 60 + 7
    assert result.computed_tokens > 10 * longest
    assert max(rows for rows, _ in masks) <= 32 and max(columns for _, columns in masks) <= longest + 32
    np.testing.assert_allclose(flat(result.support), flat(plain_support(model, rollouts)), atol=1e-4)


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
        (query([1], [2, 3], [0, 2], ([4], 0, 1), openings=[[1]]), r"openings: 1 lists for 2 boundaries"),
        (query([1], [2, 3], [0], ([4], 0, 1), openings=[[VOCAB_SIZE]]), rf"openings\[0\]\[0\] = {VOCAB_SIZE}"),
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
    ("model_type", "message"),
    [
        ("gemma3_text", "sliding_attention"),
        ("gpt_oss", "sliding_attention"),
        ("mistral", "sliding_window=4096"),
        ("gpt_neo", "local"),
        ("llama4_text", "chunked_attention"),
        ("qwen3_next", "linear_attention"),
        ("qwen3_5_text", "linear_attention"),
        ("falcon_h1", "hybrid"),
        ("jamba", "mamba"),
        ("mamba2", "mamba"),
        ("recurrent_gemma", "recurrent"),
    ],
)
def test_layers_that_are_not_full_attention_are_refused_by_name(model_type, message):
    with pytest.raises(SiopConfigError, match=f"{model_type}.*{message}"):
        check_architecture(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe", "llama", "gpt2", "phi", "olmo2"])
def test_full_attention_is_accepted(model_type):
    check_architecture(AutoConfig.for_model(model_type))


def test_a_hybrid_model_is_refused_before_its_weights_are_read(tmp_path):
    AutoConfig.for_model("qwen3_next").save_pretrained(tmp_path)
    with pytest.raises(SiopConfigError, match=f"{tmp_path}.*qwen3_next.*linear_attention"):
        TransformersEngine.from_pretrained(str(tmp_path))


def test_a_recurrent_model_is_refused():
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, context_length=32))
    with pytest.raises(SiopConfigError, match=r"rwkv.*recurrent"):
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
