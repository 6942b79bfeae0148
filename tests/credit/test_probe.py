"""Probes fit the model: where a turn begins, which texts stand around a reference, by templates of five families."""

from __future__ import annotations

import asyncio
import dataclasses
import string

import pytest
from method_helpers import Scorer
from scoring_cases import bpe_tokenizer
from tiny_models import BYTE_TOKENIZER
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from verl.utils.siop.credit.probe import DONE_THINKING, Prober, turn_form
from verl.utils.siop.errors import RolloutError, SiopConfigError
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig, compute_group_rewards
from verl.utils.siop.turn_utils import BOUNDARY_MODES, boundaries, extract_observations, get_assistant_turn_ranges

# One line each; {O}: what opens the assistant's turn.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\nTHINK' }}{% endif %}"
)
INSTRUCT = CHATML.replace("THINK", "")
PREFILLED = CHATML.replace("THINK", "<think>\\n")
HYBRID = CHATML.replace(
    "THINK'",
    "' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ ''",
)
SEED = CHATML.replace("THINK", "<seed:think>")
DEEPSEEK = (
    "{% for m in messages %}{{ '<User>' if m.role == 'user' else '<Assistant></think>' }}{{ m.content }}"
    "{% if m.role != 'user' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\\n\\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)

GPT_OSS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') "
    "+ '<|message|>' + m.content + ('<|return|>' if m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Writes an empty thought before the answers of a conversation, and leaves thinking to the model.
KIMI = CHATML.replace("m.content", "('<think></think>' if m.role == 'assistant' else '') + m.content").replace(
    "THINK", ""
)


def tokenizer_of(template):
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer, **options):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True, **options
    )
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "options", "prefix", "suffix"),
    [
        (INSTRUCT, {}, "<answer>\n", "\n</answer><|im_end|>"),
        (PREFILLED, {}, DONE_THINKING, "\n</answer><|im_end|>"),
        (HYBRID, {}, f"<think>\n{DONE_THINKING}", "\n</answer><|im_end|>"),
        (HYBRID, {"enable_thinking": False}, "<answer>\n", "\n</answer><|im_end|>"),
        (SEED, {}, DONE_THINKING.replace("</think>", "</seed:think>"), "\n</answer><|im_end|>"),
        (DEEPSEEK, {}, "<answer>\n", "\n</answer><|im_end|>"),
        (DEEPSEEK, {"thinking": True}, DONE_THINKING, "\n</answer><|im_end|>"),
        (LLAMA, {}, "<answer>\n", "\n</answer><|eot|>"),
        (MISTRAL, {}, "<answer>\n", "\n</answer></s>"),
        (GPT_OSS, {}, "<|channel|>final<|message|><answer>\n", "\n</answer><|return|>"),
        (KIMI, {}, f"<think>\n{DONE_THINKING}", "\n</answer><|im_end|>"),
        (None, {}, "<answer>\n", "\n</answer>"),
    ],
    ids=[
        "instruct",
        "prefilled",
        "hybrid",
        "hybrid without thinking",
        "seed",
        "deepseek",
        "deepseek thinking",
        "llama",
        "mistral",
        "gpt-oss",
        "kimi",
        "none",
    ],
)
def test_auto_fits_the_template(template, options, prefix, suffix):
    tokenizer = tokenizer_of(template)
    prompt = rendered(tokenizer, **options) if template else tokenizer.encode("Who?")
    prober = Prober(tokenizer, SiopConfig())
    assert prober.texts(prompt) == (prefix, suffix)
    reference = prober.reference("Paris", prompt)
    assert tokenizer.decode(reference.token_ids) == f"{prefix}Paris{suffix}"
    assert tokenizer.decode(reference.token_ids[reference.start : reference.end]) == "Paris"
    # What the policy would write after the prompt closes as much thinking as is open.
    turn = (
        (tokenizer.decode(prompt).rpartition("Who?")[2] + prefix).replace(" ", "").removeprefix("<Assistant></think>")
    )
    assert turn.count("think>") == 2 * turn.count("/think>") + 2 * turn.count("/seed:think>")
    fixed = Prober(tokenizer, SiopConfig(siop_reference_prefix="So: ", siop_reference_suffix="."))
    assert fixed.texts(prompt) == ("So: ", ".")


def test_the_form_of_a_turn():
    assert turn_form(tokenizer_of(None)) is None
    form = turn_form(tokenizer_of(HYBRID))
    assert (form.end, form.header, form.thinking) == (
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        ("<think>", "</think>"),
    )
    form = turn_form(tokenizer_of(PREFILLED))
    assert (form.header, form.thinking) == ("<|im_start|>assistant\n", ("<think>", "</think>"))
    assert turn_form(tokenizer_of(MISTRAL)).header == ""
    with pytest.raises(RolloutError, match="the chat template cannot render a question and its answer: no assistants"):
        turn_form(tokenizer_of("{{ raise_exception('no assistants') }}"))


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m.content", "m.content|lower"),
        CHATML + "{% if messages[-1].role == 'assistant' %}(about SIOP){% endif %}",
        "{% if add_generation_prompt %}Think first.{% endif %}" + CHATML,
    ],
    ids=["changes the text", "writes the text twice", "another beginning"],
)
def test_a_template_whose_turns_cannot_be_told_is_refused(template):
    with pytest.raises(RolloutError, match="the chat template cannot render a question and its answer: "):
        turn_form(tokenizer_of(template))


OBSERVATION = "\n<|im_start|>user\n<tool_response>\nParis\n</tool_response><|im_end|>\n<|im_start|>assistant\nTHINK"


def rollout_of(tokenizer, think="", turn_end="<|im_end|>", **options):
    pieces = [
        (f"I search.{turn_end}", 1),
        (OBSERVATION.replace("THINK", think), 0),
        (f"Once more.{turn_end}", 1),
        (OBSERVATION.replace("THINK", think), 0),
        ("</think>" * bool(think) + "<answer>Paris</answer><|im_end|>", 1),
    ]
    response, mask = [], []
    for text, owner in pieces:
        ids = tokenizer.encode(text, add_special_tokens=False)
        response, mask = response + ids, mask + [owner] * len(ids)
    return Rollout("q", "Who?", rendered(tokenizer, **options), response, mask)


@pytest.mark.parametrize("mode", BOUNDARY_MODES)
@pytest.mark.parametrize(
    ("template", "think", "options"),
    [
        (INSTRUCT, "", {}),
        (PREFILLED, "<think>\n", {}),
        (HYBRID, "<think>\n\n</think>\n\n", {"enable_thinking": False}),
    ],
    ids=["instruct", "prefilled", "without thinking"],
)
def test_every_context_ends_as_the_policys_turn_begins(mode, template, think, options):
    tokenizer = tokenizer_of(template)
    rollout = rollout_of(tokenizer, think, **options)
    seen = []

    class Recording(Scorer):
        async def support(self, rollouts):
            seen.extend(rollouts)
            return await super().support(rollouts)

    asyncio.run(compute_group_rewards([rollout, rollout], tokenizer, SiopConfig(siop_boundary=mode), Recording()))
    turns = get_assistant_turn_ranges(rollout.response_mask)
    opening = f"<|im_end|>\n<|im_start|>assistant\n{think}"
    for request in seen:
        assert request.boundaries == boundaries(turns, mode)
        contexts = [
            tokenizer.decode([*request.prompt_ids, *request.response_ids[:end], *inserted])
            for end, inserted in request.opened()
        ]
        assert all(context.endswith(opening) for context in contexts)
        # And nothing else than the opening is added: one turn end for each turn.
        assert [context.count("<|im_end|>") for context in contexts] == {
            "before_answer": [1, 2, 4, 5],
            "assistant": [1, 2, 4, 6],
            "observation": [1, 3, 5, 5],
        }[mode]


@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_the_releases_form_inserts_nothing(mode):
    tokenizer = tokenizer_of(INSTRUCT)
    rollout = rollout_of(tokenizer)
    ends = [end for _, end in get_assistant_turn_ranges(rollout.response_mask)]
    where = boundaries(get_assistant_turn_ranges(rollout.response_mask), mode)
    given = (rollout.prompt_ids, rollout.response_ids, ends, where)
    if mode == "observation":
        assert Prober(tokenizer, SiopConfig(siop_boundary=mode)).openings(*given) == []
        with pytest.raises(SiopConfigError, match="siop_probe_opening=False has no effect with siop_boundary='obs"):
            SiopConfig(siop_boundary=mode, siop_probe_opening=False)
        return
    config = SiopConfig(siop_boundary=mode)
    assert Prober(tokenizer, config).openings(*given) != []
    assert Prober(tokenizer, dataclasses.replace(config, siop_probe_opening=False)).openings(*given) == []
    # Without a chat template nobody knows how a turn begins: the prompt alone says nothing.
    assert Prober(tokenizer_of(None), config).openings(*given) == []


def test_a_turn_without_its_end_token_gets_one():
    tokenizer = tokenizer_of(INSTRUCT)
    cut = rollout_of(tokenizer, turn_end="")
    ends = [end for _, end in get_assistant_turn_ranges(cut.response_mask)]
    first, *_ = Prober(tokenizer, SiopConfig()).openings(cut.prompt_ids, cut.response_ids, ends, ends[:1])
    assert tokenizer.decode(first) == "<|im_end|>\n<|im_start|>assistant\n"
    # Any token that ends a turn does: a model may have one of its own for turns that call tools.
    other = rollout_of(tokenizer, turn_end="<|endoftext|>")
    ends = [end for _, end in get_assistant_turn_ranges(other.response_mask)]
    first, *_ = Prober(tokenizer, SiopConfig()).openings(other.prompt_ids, other.response_ids, ends, ends[:1])
    assert tokenizer.decode(first) == "\n<|im_start|>assistant\n"


def test_white_space_before_the_end_token_does_not_repeat_it():
    tokenizer = tokenizer_of(INSTRUCT.replace("'<|im_end|>", "' <|im_end|>"))
    for turn, opening in [("I search.<|im_end|>", "\n"), ("I search.", " <|im_end|>\n")]:
        ids = tokenizer.encode(turn, add_special_tokens=False)
        (found,) = Prober(tokenizer, SiopConfig()).openings(rendered(tokenizer), ids, [len(ids)], [len(ids)])
        assert tokenizer.decode(found) == f"{opening}<|im_start|>assistant\n"


def test_control_tokens_without_a_role_are_control_tokens():
    tokenizer = tokenizer_of(PHI)
    added = [AddedToken(f"<|{name}|>", special=True) for name in ("end", "user", "assistant", "tool")]
    tokenizer.add_tokens(added)
    assert "<|end|>" not in tokenizer.all_special_tokens
    pieces = ["I search.<|end|>", "\n<|tool|>\nA passage<|end|>\n<|assistant|>\n", "<answer>x</answer><|end|>"]
    ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    end, start = len(ids[0]), len(ids[0] + ids[1])
    response = [*ids[0], *ids[1], *ids[2]]
    (opening,) = Prober(tokenizer, SiopConfig()).openings(rendered(tokenizer), response, [end, len(response)], [end])
    assert tokenizer.decode(opening) == "\n<|assistant|>\n"
    (observation,) = extract_observations(response, [(0, end), (start, len(response))], tokenizer)
    assert observation.split() == ["A", "passage"]


def test_a_header_of_plain_text_is_found_by_its_text():
    # As SentencePiece, the tokenizer marks the beginning of a text and words: the header alone has other tokens.
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator([string.printable, *["<|user|>\nWho?", "\n<|assistant|>\n<answer>"] * 50], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = PHI.replace("<|end|>", "</s>")
    response = tokenizer.encode("search</s>", add_special_tokens=False)
    end = len(response)
    (opening,) = Prober(tokenizer, SiopConfig()).openings(rendered(tokenizer), response, [end], [end])
    assert "".join(tokenizer.convert_ids_to_tokens(opening)).endswith("<|assistant|>\n")
    assert "</s>" not in tokenizer.convert_ids_to_tokens(opening)
    assert "Who" not in tokenizer.decode(opening)


def test_a_prompt_that_opens_no_turn_is_named():
    tokenizer = tokenizer_of(INSTRUCT)
    rollout = rollout_of(tokenizer)
    rollout.prompt_ids = tokenizer.encode("Who?", add_special_tokens=False)
    with pytest.raises(
        RolloutError, match=r"does not end with the opening .*assistant.* but with 'Who\?'; .*opening=false"
    ):
        asyncio.run(compute_group_rewards([rollout], tokenizer, SiopConfig(), Scorer()))


def test_header_whose_white_space_merges_with_what_follows_is_found():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = PREFILLED
    try:
        prober = Prober(tokenizer, SiopConfig())
        prompt = rendered(tokenizer)
        (opening,) = prober.openings(prompt, tokenizer.encode("Hm.<|im_end|>"), [1], [1])
        assert tokenizer.decode(opening).endswith("<|im_start|>assistant\n<think>\n")
    finally:
        tokenizer.chat_template = None
