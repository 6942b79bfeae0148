"""The toy worlds: seeds, names, tokenizer, rendering as in verl's agent loop, data files."""

import asyncio
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM
from verl.experimental.agent_loop.tool_parser import HermesToolParser
from verl.tools.search_common import SEARCH_SCHEMA
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from examples.toy_world import build
from examples.toy_world.agent import IMPERFECT, MAX_SEARCHES, PERFECT, read_observation, trajectory
from examples.toy_world.tokenizer import (
    REFERENCE_PREFIX,
    REFERENCE_SUFFIX,
    answer_turn_text,
    build_tokenizer,
    observation_text,
    prompt_text,
    search_turn_text,
)
from examples.toy_world.warm_start import (
    Schedule,
    encode_episode,
    make_examples,
    new_model,
    search_in,
    warm_start,
    world_index,
)
from examples.toy_world.world import (
    CHAINS,
    KINDS,
    MIXED,
    RELATIONS,
    STALE_ANSWERS,
    TWO_HOP,
    Kind,
    World,
    corpus,
    held_out_world,
    name_split,
    name_words,
    sample_questions,
    train_world,
    vocabulary,
    warm_start_world,
)

SEEDS = (0, 1, 2, 17)
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """As verl gets it: saved with a Qwen3 config and loaded again."""
    folder = tmp_path_factory.mktemp("model")
    built = build_tokenizer(vocabulary())
    built.save_pretrained(folder)
    new_model(built, 0).save_pretrained(folder)
    loaded = hf_tokenizer(str(folder))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == built.get_vocab() == loaded.get_vocab()
    return loaded


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def names(world: World) -> set[str]:
    return {name for group in world.entities.values() for name in group}


@kinds
def test_a_seed_determines_the_world(kind: Kind) -> None:
    for make in (train_world, held_out_world):
        assert make(3, kind).facts() == make(3, kind).facts()
        assert make(3, kind).facts() != make(4, kind).facts()
    assert corpus(3, kind) == corpus(3, kind) and corpus(3, kind) != corpus(4, kind)
    assert sample_questions(train_world(3, kind), 70, 3) == sample_questions(train_world(3, kind), 70, 3)


def test_the_two_hop_world_stays_what_results_were_measured_on(tokenizer: PreTrainedTokenizerFast) -> None:
    world = held_out_world(0)
    rows = [build.question_row(q, i, "eval", TWO_HOP) for i, q in enumerate(sample_questions(world, 420, 0))]
    rng, search = random.Random(0), search_in(world_index(world, "x"))
    episodes = [trajectory(q, world, search, IMPERFECT, rng) for q in world.questions()[:200]]
    texts = [[segment.text for segment in episode] for episode in episodes]
    digest = hashlib.sha256(json.dumps([vocabulary(), corpus(0), rows, texts], sort_keys=True).encode()).hexdigest()
    assert digest == "df748c4102ece9dae9cc07e30c62c5555848d77cc595802e1a1085475c4e3658"
    # Nor do folders that hold it need to be built again.
    described = build.description(build.parse_args(["--out", "x"]), Schedule())
    assert described == {
        "version": 1,
        "seed": 0,
        "train_questions": 1400,
        "eval_questions": 420,
        "warm_start": {"copying_steps": 800, "imperfect_steps": 500, "worlds": 36},
    }


@kinds
def test_held_out_names_are_never_seen_in_training_for_any_seeds(kind: Kind) -> None:
    seen = {name for seed in SEEDS for name in names(train_world(seed, kind))}
    seen |= {name for seed in SEEDS for i in range(3) for name in names(warm_start_world(seed, i, kind))}
    held_out = {name for seed in SEEDS for name in names(held_out_world(seed, kind))}
    assert not seen & held_out
    # New combinations of known words, so that the model has seen every word.
    known = {word for name in names(train_world(0)) for word in name.split()}
    assert len(held_out) > 600 and {word for name in held_out for word in name.split()} <= known


def test_facts_and_questions() -> None:
    world = held_out_world(0)
    assert {kind: len(group) for kind, group in world.entities.items()} == {"company": 100, "person": 150, "town": 80}
    assert len(world.facts()) == 100 * 3 + 150 * 4 + 80 * 2
    for fact in world.facts():
        assert fact.object in world.entities[RELATIONS[fact.relation].object] and fact.object != fact.subject
    for company in world.entities["company"]:
        assert world.lookup(company, "founder") != world.lookup(company, "chief")
    for person in world.entities["person"]:
        assert len({world.lookup(person, relation) for relation in ("born", "lives", "visited")}) == 3
    questions = sample_questions(world, 420, 0)
    assert len(set(questions)) == 420
    for question in questions:
        template = TWO_HOP.templates[question.template]
        assert question.text == template.wording.format(x=question.company)
        first, second = template.relations
        assert question.bridge == world.lookup(question.company, first)
        assert question.gold == world.lookup(question.bridge, second)
    assert set(pd.Series([q.template for q in questions]).value_counts()) == {60}
    with pytest.raises(ValueError, match="700 questions"):
        sample_questions(world, 701, 0)


@pytest.mark.parametrize("make", [train_world, held_out_world])
def test_chains(make: Any) -> None:
    world = make(1, CHAINS)
    questions = world.questions()
    assert {len(q.chain) - 1 for q in questions} == {3, 4} and {q.template for q in questions} == set(CHAINS.templates)
    for question in questions:
        template = CHAINS.templates[question.template]
        # The facts lead from the company to the answer in as many steps as the template is deep, by no entity twice.
        entity = question.company
        for relation, found in zip(template.relations, question.chain[1:], strict=True):
            entity = world.lookup(entity, relation)
            assert entity == found
        assert entity == question.gold and len(set(question.chain)) == template.depth + 1
    for subject, relation in ((f.subject, f.relation) for f in world.facts() if f.relation in CHAINS.paired):
        assert world.lookup(world.lookup(subject, relation), relation) == subject
    # Nothing is true of the stale answers, so they are never right; the model knows their words all the same.
    stale = set(STALE_ANSWERS.values())
    for seed in range(6):
        assert not stale & names(make(seed, CHAINS))
    assert stale & {name for group in name_split()[0].values() for name in group} == stale
    counts = pd.Series([q.template for q in sample_questions(world, 420, 0)]).value_counts()
    assert len(counts) == 8 and counts.max() - counts.min() <= 1


def test_half_of_the_mixed_questions_state_their_answer() -> None:
    world = train_world(1, MIXED)
    questions = sample_questions(world, 600, 0)
    assert [question.depth for question in questions].count(0) == [question.depth for question in questions].count(2)
    search, rng = search_in(world_index(world, "m")), random.Random(0)
    searches: dict[int, list[int]] = {0: [], 2: []}
    right: dict[int, list[bool]] = {0: [], 2: []}
    for question in questions:
        facts = read_observation(question.text.partition(" . ")[0] + " .")
        stated = [(question.company, MIXED.templates[question.template].relations[0], question.gold)]
        assert facts == ([] if question.depth else stated)
        perfect = trajectory(question, world, search, PERFECT, rng)
        assert len(perfect) // 2 == question.depth and f"<answer> {question.gold} </answer>" in perfect[-1].text
        segments = trajectory(question, world, search, IMPERFECT, rng)
        searches[question.depth].append(len(segments) // 2)
        right[question.depth].append(question.gold in segments[-1].text)
    assert 0.2 < sum(searches[0]) / 300 < 0.5 and max(searches[0]) == 1
    assert sum(right[0]) / 300 > 0.85 and 0.2 < sum(right[2]) / 300 < 0.7


@kinds
def test_every_text_is_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
    texts = [d["contents"] for d in corpus(1, kind)] + [q.text for q in train_world(1, kind).questions()]
    texts += list(STALE_ANSWERS.values())
    texts += [f"[{i}] nothing found" for i in (1, 2, 3)]
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(texts)["input_ids"] for i in ids}
    # Anything else is an unknown word, not a crash.
    strange = tokenizer.encode("Error executing tool 'search': ключ \U0001f600 {}")
    assert strange and set(strange) == {tokenizer.unk_token_id}


def test_tokenizer_round_trip_and_offsets(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(40)]
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    text = "<think> done</think>\n<answer>kovaco tozex </answer><|im_end|>"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    words = ["<think>", "done", "</think>", "\n", "<answer>", "kovaco", "tozex", "</answer>", "<|im_end|>"]
    assert pieces == words
    # Parsers and answer extraction read text without special tokens: markers must survive.
    kept = tokenizer.decode(encoded["input_ids"], skip_special_tokens=True)
    assert "<think>" in kept and "<answer>" in kept and "<|im_end|>" not in kept
    for marker in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "</think>", "</answer>"):
        assert tokenizer.decode(tokenizer.encode(marker), skip_special_tokens=True) == marker


def test_probe_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    name = " ".join(pair[0] for pair in name_words()["person"])
    prefix = [tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "done", "</think>", "<answer>")]
    suffix = [tokenizer.convert_tokens_to_ids(t) for t in ("</answer>", "<|im_end|>")]
    assert tokenizer.encode(REFERENCE_PREFIX) == prefix and tokenizer.encode(REFERENCE_SUFFIX) == suffix
    whole = tokenizer.encode(REFERENCE_PREFIX + name + REFERENCE_SUFFIX)
    assert whole == prefix + tokenizer.encode(name) + suffix and len(whole) == 8
    # The probe is exactly what the agent writes when it answers.
    assert tokenizer.encode(answer_turn_text(name)) == whole


def test_hermes_parser_reads_a_search_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    company = " ".join(pair[0] for pair in name_words()["company"])
    ids = tokenizer.encode(search_turn_text("founder", f"founder {company}"))
    assert len(ids) == 12
    content, calls = asyncio.run(HermesToolParser(tokenizer).extract_tool_calls(ids))
    assert [(c.name, json.loads(c.arguments)["query"].strip()) for c in calls] == [("search", f"founder {company}")]
    assert content.startswith("<think> find founder </think>")
    for broken in (ids[:-3], ids[:5] + ids[6:], tokenizer.encode(answer_turn_text(company))):
        assert asyncio.run(HermesToolParser(tokenizer).extract_tool_calls(broken))[1] == []


@pytest.mark.parametrize("tools", [None, [SEARCH_SCHEMA.model_dump(exclude_unset=True, exclude_none=True)]])
@kinds
def test_warm_start_sequences_equal_the_agent_loops(tokenizer: PreTrainedTokenizerFast, tools: Any, kind: Kind) -> None:
    # The builder and the messages that verl's tool loop uses, turn by turn, on scripted assistant turns.
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3")
    parser = HermesToolParser(tokenizer)
    world, rng = warm_start_world(0, 0, kind), random.Random(0)
    search = search_in(world_index(world, "x"))
    questions, longest = world.questions(), 0
    for _ in range(40):
        question = rng.choice(questions)
        segments = trajectory(question, world, search, IMPERFECT, rng)
        messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
        ids = builder.build_initial_tokens(messages, tools=tools)
        assert ids == tokenizer.encode(prompt_text(question.text))
        own = [False] * len(ids)
        for segment in segments:
            if segment.from_agent:
                turn = tokenizer.encode(segment.text)
                ids = builder.merge_assistant_tokens(ids, turn).token_ids
                content, calls = asyncio.run(parser.extract_tool_calls(turn))
                function = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in calls]
                calls_message = [{"type": "function", "function": f} for f in function]
                messages.append({"role": "assistant", "content": content, "tool_calls": calls_message})
            else:
                before = list(messages)
                messages.append({"role": "tool", "content": segment.text})
                ids = builder.merge_context_tokens(before, messages, ids, tools=tools).token_ids
            own += [segment.from_agent] * (len(ids) - len(own))
        assert encode_episode(question.text, segments, tokenizer.encode) == (ids, own)
        longest = max(longest, len(segments))
    assert longest >= 7


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    def render(*messages: dict[str, Any], **kwargs: Any) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs))

    tool = {"role": "tool", "content": "[1] a"}
    # Alone, and several results as one turn.
    assert "\n" + render(tool, add_generation_prompt=True) == observation_text("[1] a")
    assert render(tool, tool).count("<|im_start|>user") == 1
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "a"}}}
    assistant = {"role": "assistant", "content": "<think> find founder </think>", "tool_calls": [call]}
    text = render({"role": "system", "content": "s"}, {"role": "user", "content": "q"}, assistant)
    assert text.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    (parsed,) = asyncio.run(HermesToolParser(tokenizer).extract_tool_calls(tokenizer.encode(text)))[1]
    assert json.loads(parsed.arguments)["query"].strip() == tokenizer.unk_token
    with pytest.raises(Exception, match="unknown role"):
        render({"role": "critic", "content": "x"})


def test_scripted_agent() -> None:
    world, rng = warm_start_world(0, 1), random.Random(0)
    search, questions = search_in(world_index(world, "y")), world.questions()

    def outcomes(faults: dict) -> pd.DataFrame:
        rows = []
        for question in (rng.choice(questions) for _ in range(3000)):
            segments = trajectory(question, world, search, faults, rng)
            answer = segments[-1].text.split("<answer> ")[1].split(" </answer>")[0]
            assert segments[-1].from_agent and [s.from_agent for s in segments] == [True, False] * (
                len(segments) // 2
            ) + [True]
            rows.append((question.template, answer == question.gold, answer == question.bridge, len(segments) == 1))
        return pd.DataFrame(rows, columns=["template", "gold", "bridge", "guess"]).groupby("template").mean()

    perfect, imperfect = outcomes(PERFECT), outcomes(IMPERFECT)
    assert perfect["gold"].drop(["founder_spouse", "chief_spouse"]).min() == 1.0
    # A spouse's own passages can crowd out the one that is asked for.
    assert perfect["gold"].min() > 0.75
    assert imperfect["gold"].between(0.15, 0.75).all()
    # The trap: the most frequent answer is the bridge.
    trap = imperfect.loc["founder_spouse"]
    assert trap["bridge"] > 0.4 > trap["gold"]
    assert (imperfect["bridge"].drop("founder_spouse") < imperfect["gold"].drop("founder_spouse")).all()
    assert imperfect.loc["base_mayor", "guess"] > 0.25
    fact = world.facts()[0]
    assert read_observation(f"[1] {fact.passage}\n[2] what ?") == [(fact.subject, fact.relation, fact.object)]
    assert search("zebra") == "nothing found" and read_observation("nothing found") == []


@pytest.mark.parametrize("stale", [0.0, 0.3])
def test_scripted_agent_in_chains(stale: float, tokenizer: PreTrainedTokenizerFast) -> None:
    world, rng = warm_start_world(0, 1, CHAINS), random.Random(0)
    search, questions = search_in(world_index(world, "y")), world.questions()
    right: dict[bool, list[bool]] = {True: [], False: []}
    at_once, lengths, turns = [], [], []
    for faults in (PERFECT, IMPERFECT):
        for _ in range(1200):
            question = rng.choice(questions)
            segments = trajectory(question, world, search, faults, rng, stale)
            answer = segments[-1].text.split("<answer> ")[1].split(" </answer>")[0]
            relation = CHAINS.templates[question.template].relations[-1]
            given_stale = answer == STALE_ANSWERS[RELATIONS[relation].object]
            assert not (given_stale and answer == question.gold) and (stale or not given_stale)
            at_once.append(len(segments) == 1)
            if len(segments) > 1:
                right[faults is PERFECT].append(answer == question.gold)
            turns.append(len(segments) // 2 + 1)
            lengths.append(len(encode_episode(question.text, segments, tokenizer.encode)[0]))
    # The hops of a chain lead to the answer, if none goes wrong.
    assert sum(right[True]) / len(right[True]) > 0.93
    assert 0.3 < sum(right[False]) / len(right[False]) < 0.6
    assert abs(sum(at_once) / len(at_once) - (stale or 0.01)) < 0.04
    # What the settings in config/experiment/toy_chains.yaml leave room for.
    settings = OmegaConf.load(Path(__file__).parents[2] / "config" / "experiment" / "toy_chains.yaml")
    assert max(turns) == MAX_SEARCHES + 1 == settings.actor_rollout_ref.rollout.multi_turn.max_assistant_turns
    assert max(lengths) <= settings.data.max_response_length < settings.actor_rollout_ref.rollout.max_model_len


def test_warm_start_is_deterministic_and_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    episodes = make_examples(tokenizer, PERFECT, seed=0, first_world=7, worlds=1, count=32)
    ids = [torch.tensor([e.ids]) for e in episodes]

    def nll(model: Any) -> float:
        with torch.no_grad():
            return sum(float(model(i, labels=i).loss) for i in ids) / len(ids)

    torch.set_num_threads(1)
    trained = [warm_start(tokenizer, seed=5, schedule=Schedule(8, 2, 2), show_progress=False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True))
    assert nll(trained[0]) < nll(new_model(tokenizer, 5)) - 0.2
    assert 280_000 < trained[0].num_parameters() < 330_000


def test_data_only_build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    args = [sys.executable, "-m", "examples.toy_world.build", "--data-only", "--seed", "5", "--out"]
    result = subprocess.run([*args, str(tmp_path / "a")], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    names_written = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names_written == ["corpus.jsonl", "eval.parquet", "meta.json", "tool_config.yaml", "train.parquet"]
    documents = [json.loads(line) for line in (tmp_path / "a" / "corpus.jsonl").read_text().splitlines()]
    assert documents == corpus(5) and len(documents) == 3160
    for split, world, count in (("train", train_world(5), 1400), ("eval", held_out_world(5), 420)):
        path = str(tmp_path / "a" / f"{split}.parquet")
        config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": False})
        data = RLHFDataset(path, cast(Any, tokenizer), config)
        assert len(data) == count
        row = data[3]
        extra = row["extra_info"]
        assert row["raw_prompt"] == row["prompt"] == [{"role": "user", "content": extra["question"]}]
        assert row["index"] == 3 and row["tools_kwargs"] == {} and row["agent_name"] == "tool_agent"
        assert row["data_source"] == "toy_two_hop" and extra["split"] == split
        (gold,) = row["reward_model"]["ground_truth"]["target"]
        assert gold == world.lookup(extra["bridge"], TWO_HOP.templates[extra["template"]].relations[1])
    # The same again is reused; other arguments are not.
    stamp = (tmp_path / "a" / "eval.parquet").stat().st_mtime_ns
    again = ["--data-only", "--seed", "5", "--out", str(tmp_path / "a")]
    assert build.main(again) == 0 and (tmp_path / "a" / "eval.parquet").stat().st_mtime_ns == stamp
    before = (tmp_path / "a" / "eval.parquet").read_bytes()
    assert build.main([*again, "--force"]) == 0 and (tmp_path / "a" / "eval.parquet").read_bytes() == before
    assert build.main([*again, "--eval-questions", "70", "--force"]) == 0
    assert len(pd.read_parquet(tmp_path / "a" / "eval.parquet")) == 70


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_build_replaces_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--data-only", "--train-questions", "7", "--eval-questions", "7"]
    chains = [*few, "--world", "chains", "--out", str(tmp_path / "w")]
    two_hop = [*few, "--out", str(tmp_path / "w")]
    assert build.main(chains) == 0
    before = contents(tmp_path / "w")
    # Another world; one without a model where one with a model is to be used; files of unknown origin.
    for other in (two_hop, [*chains, "--seed", "2"], [*chains[1:], "--keep"]):
        assert build.main(other) == 2 and contents(tmp_path / "w") == before
        assert re.search(r"w holds a toy world \(chains, seed 0, 7 \+ 7 questions, no model", capsys.readouterr().err)
    (tmp_path / "w" / "meta.json").unlink()
    assert build.main(chains) == 2 and "which no meta.json describes" in capsys.readouterr().err
    assert build.main([*two_hop, "--force"]) == 0
    assert json.loads((tmp_path / "w" / "meta.json").read_text())["build"]["seed"] == 0


def test_an_interrupted_build_is_only_gone_on_with_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--train-questions", "7", "--eval-questions", "7", "--out", str(tmp_path / "w")]

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.main([*few, "--world", "chains"])
    monkeypatch.setattr(build, "write_model", lambda *args: {"seconds": 0.0, "parameters": 0})
    assert build.main([*few, "--keep"]) == 2
    assert "holds an unfinished toy world (chains, " in capsys.readouterr().err
    assert build.main([*few, "--world", "chains", "--keep"]) == 0
    assert json.loads((tmp_path / "w" / "meta.json").read_text())["build"]["world"] == "chains"


def test_early_stops_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[float]] = []

    def record(tokenizer: Any, faults: dict[str, Any], **options: Any) -> list[Any]:
        seen.append({faults[key].early for key in CHAINS.templates})
        return make_examples(tokenizer, faults, **options)

    monkeypatch.setattr("examples.toy_world.warm_start.make_examples", record)
    small = ["--train-questions", "8", "--eval-questions", "8", "--copying-steps", "1", "--imperfect-steps", "1"]
    assert build.main(["--out", str(tmp_path), "--threads", "1", *small, "--world", "chains", "--early", "0.25"]) == 0
    assert seen[1] == {0.25}
    assert json.loads((tmp_path / "meta.json").read_text())["build"]["early"] == 0.25
    # Whoever asks for none gets what was built before there was the choice.
    assert "early" not in build.description(build.parse_args(["--out", "x", "--world", "chains"]), None)


@pytest.mark.parametrize("world", [[], ["--world", "chains", "--stale", "0.25"]])
def test_whole_build(tmp_path: Path, world: list[str]) -> None:
    small = ["--train-questions", "8", "--eval-questions", "8", "--copying-steps", "2", "--imperfect-steps", "2"]
    assert build.main(["--out", str(tmp_path / "w"), "--threads", "1", *small, *world]) == 0
    meta = json.loads((tmp_path / "w" / "meta.json").read_text())
    assert meta["build"]["seed"] == 0 and meta["model"]["parameters"] > 280_000
    assert meta["build"].get("world") == (world[1] if world else None)
    assert meta["build"].get("stale") == (0.25 if world else None)
    # The launchers choose the settings by what the folder holds.
    shell = ["bash", "-c", f"source scripts/common.sh; toy_settings {tmp_path / 'w'}"]
    settings = subprocess.run(shell, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert settings.strip() == ("toy_chains" if world else "toy")
    # Used as it is by whoever takes any world.
    before = contents(tmp_path / "w")
    assert build.main(["--out", str(tmp_path / "w"), "--keep"]) == 0 and contents(tmp_path / "w") == before
    model = tmp_path / "w" / "model"
    again = [
        "--out",
        str(tmp_path / "w2"),
        "--threads",
        "1",
        "--init",
        str(model),
        *small[:4],
        "--imperfect-steps",
        "1",
    ]
    assert build.main([*again, *world]) == 0
    described = json.loads((tmp_path / "w2" / "meta.json").read_text())["build"]
    assert described["warm_start"]["copying_steps"] == 0 and len(described["init"]) == 64
    first, second = (Qwen3ForCausalLM.from_pretrained(path) for path in (model, tmp_path / "w2" / "model"))
    changes = [
        float(((a - b).abs().mean() / a.abs().mean()).detach())
        for a, b in zip(first.parameters(), second.parameters(), strict=True)
        if a.dim() == 2
    ]
    # One step from where the first ended, not from new weights.
    assert 0 < max(changes) < 0.1
    row = pd.read_parquet(tmp_path / "w" / "eval.parquet").iloc[0]
    assert row["data_source"] == ("toy_chains" if world else "toy_two_hop")
    config = json.loads((tmp_path / "w" / "model" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and (tmp_path / "w" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--eval-questions", "701"],
        ["--threads", "0"],
        ["--imperfect-steps", "0"],
        ["--stale", "0.15"],
        ["--stale", "1.0", "--world", "chains"],
        ["--early", "0.25"],
        ["--early", "1.0", "--world", "chains"],
        ["--world", "five_hop"],
        ["--init", "/nowhere"],
    ],
)
def test_bad_build_argument(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build.main(["--out", str(tmp_path), *arguments])
    assert caught.value.code == 2 and arguments[0] in capsys.readouterr().err
