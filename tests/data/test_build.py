"""Building data: shapes, sets, what is left out and counted, labels, and what a second call does."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_trees import (
    ROWS,
    TREES,
    deepresearcher_tree,
    flashrag_tree,
    made_up,
    searchr1_row,
    write_jsonl,
    write_parquet,
)
from verl.utils.reward_score.siop_reward import compute_score, parse_aliases
from verl.utils.siop.data.build import build, surprises
from verl.utils.siop.data.cli import main
from verl.utils.siop.data.manifest import FolderError, Manifest, check_folder, compare, read_manifest, rows_of
from verl.utils.siop.data.presets import PRESETS
from verl.utils.siop.data.rows import SCHEMA, answer_type, question_key, reachable
from verl.utils.siop.data.select import Options
from verl.utils.siop.data.sources import SourceError, digests
from verl.utils.siop.errors import SiopConfigError

Build = Callable[..., Manifest | None]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def options(tmp_path: Path, out: Path) -> Options:
    tree = flashrag_tree(tmp_path / "tree")
    return Options(out=out, preset="searchr1", source=(str(tree),), prompt="hermes-instruct")


def own(out: Path, *sources: Path | str, **changes: Any) -> Options:
    return Options(out=out, source=tuple(map(str, sources)), prompt="hermes-instruct", **changes)


def built(options: Options) -> Manifest:
    manifest = build(options)
    assert manifest is not None
    return manifest


def rows(folder: Path, part: str) -> list[dict[str, Any]]:
    return list(rows_of(folder / f"{part}.parquet"))


def ids(folder: Path, part: str = "train", name: str = "nq") -> list[str]:
    return [row["extra_info"]["id"] for row in rows(folder, part) if row["data_source"] == name]


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", TREES)
def test_every_shape_gives_the_same_questions_and_aliases(tmp_path: Path, shape: str) -> None:
    tree = TREES[shape](tmp_path / shape)
    manifest = built(Options(out=tmp_path / "out", preset="searchr1", source=(str(tree),), prompt="bare"))
    assert {source.shape for source in manifest.sources} == {shape}
    for part in ("train", "eval"):
        found = [
            (row["data_source"], row["extra_info"]["question"], row["reward_model"]["ground_truth"]["target"])
            for row in rows(tmp_path / "out", part)
        ]
        wanted = [
            (name, row["question"], row["golden_answers"])
            for name, stem in PRESETS["searchr1"].files(part).items()
            for row in made_up(name, stem.partition("/")[2])
        ]
        assert found == wanted


def test_deepresearchers_file_is_taken_whole(tmp_path: Path, out: Path) -> None:
    tree = deepresearcher_tree(tmp_path / "tree")
    path = tree / "data" / "test.parquet"
    again = pq.read_table(path).to_pylist()
    again.append({**again[3], "extra_info": {"index": "nq_twin", "split": "dev"}})  # published is published
    write_parquet(path, again)
    options = Options(out=out, preset="deepresearcher", source=(str(tree),), prompt="hermes-thinking")
    manifest = built(options)
    sets = manifest.outputs["eval.parquet"].sets
    assert {name: n.rows for name, n in sets.items()} == {
        name: ROWS + (name == "nq") for name in PRESETS["deepresearcher"].eval
    }
    assert all(not n.dropped for n in sets.values())
    assert [row["extra_info"]["duplicate_of"] for row in rows(out, "eval") if row["extra_info"]["id"] == "nq_twin"] == [
        "nq/nq_3"
    ]
    assert list(manifest.outputs["train.parquet"].sets) == ["nq", "triviaqa", "hotpotqa", "2wikimultihopqa"]
    (note,) = surprises(manifest, PRESETS["deepresearcher"])
    assert "data/test.parquet is not the published file" in note and "9e2bf1f2" in note


def test_plain_questions_by_dataset_and_split(tmp_path: Path, out: Path) -> None:
    mixed = [
        {"_id": "a", "question": "q a", "answer": "x", "answer_aliases": ["y"], "dataset": "2wiki", "split": "train"},
        {"_id": "b", "question": "q b", "answer": 1969.0, "dataset": "musique", "split": "dev"},
    ]
    built(own(out, write_jsonl(tmp_path / "mixed.jsonl", mixed)))
    (train,), (evaluation,) = rows(out, "train"), rows(out, "eval")
    assert (train["data_source"], train["reward_model"]["ground_truth"]["target"]) == ("2wikimultihopqa", ["x", "y"])
    assert (evaluation["data_source"], evaluation["reward_model"]["ground_truth"]["target"]) == ("musique", ["1969"])


def test_fanoutqa_is_taken_where_a_short_answer_exists(out: Path) -> None:
    path = Path(str(importlib.metadata.distribution("fanoutqa").locate_file("fanoutqa/data/fanout-final-dev.json")))
    counts = built(own(out, f"eval:fanoutqa={path}")).outputs["eval.parquet"].sets["fanoutqa"]
    dropped = {"answer is a bool": 1, "answer is a dict": 274, "answer is a list": 12}
    assert (counts.read, counts.rows, counts.dropped) == (310, 23, dropped)
    content = {question["id"]: question for question in json.loads(path.read_text())}
    for row in rows(out, "eval"):
        question = content[row["extra_info"]["id"]]
        assert row["extra_info"]["question"] == question["question"].strip()
        assert row["reward_model"]["ground_truth"]["target"] == [str(question["answer"]).strip()]


def test_what_was_built_can_be_built_from(options: Options, tmp_path: Path, out: Path) -> None:
    built(options)
    sources = [f"{part}={out / f'{part}.parquet'}" for part in ("train", "eval")]
    built(own(tmp_path / "again", *sources))
    for part in ("train", "eval"):
        assert rows(tmp_path / "again", part) == rows(out, part)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_verls_format_in_one_schema(options: Options, out: Path) -> None:
    built(options)
    row = rows(out, "eval")[1]
    assert row["prompt"][-1] == {"role": "user", "content": "who is number 1 in the test part of nq?"}
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["agent_name"] == "tool_agent" and row["ability"] == "search"
    label = row["reward_model"]["ground_truth"]
    assert compute_score("nq", "<answer>p 1</answer>", label)["em"] == 1.0
    assert row["extra_info"] == {
        "index": 1,
        "id": "test_1",
        "set": "nq",
        "split": "test",
        "question": "who is number 1 in the test part of nq?",
        "answer_type": "span",
        "reachable": True,
        "duplicate_of": None,
    }
    paths = [str(out / f"{part}.parquet") for part in ("train", "eval")]
    assert all(pq.read_schema(path).equals(SCHEMA) for path in paths)
    # As verl reads several files: into one table.
    assert len(datasets.load_dataset("parquet", data_files=paths)["train"]) == 9 * ROWS


@pytest.mark.parametrize(
    ("alias", "kind"),
    [
        ("Yes", "yes_no"),
        ("no.", "yes_no"),
        ("1969", "date"),
        ("4 July 1776", "date"),
        ("July 4, 1776", "date"),
        ("2001-09-11", "date"),
        ("March", "span"),
        ("3,000", "number"),
        ("$5 million", "number"),
        ("12", "number"),
        ("9 lives", "span"),
        ("Paris", "span"),
        ("mayor", "span"),
    ],
)
def test_answer_types(alias: str, kind: str) -> None:
    assert answer_type([alias, "something else"]) == kind


def test_a_label_is_reachable_if_an_answer_of_so_many_words_equals_it() -> None:
    assert reachable(["one two three", "the a b c d"], 3) and not reachable(["one two three four"], 3)
    assert reachable(["The Three Words Here"], 3)  # EM does not see articles


def test_a_label_of_5000_words_is_kept_and_counted(options: Options, out: Path) -> None:
    manifest = built(options)
    for output in manifest.outputs.values():
        for counts in output.sets.values():
            assert (counts.rows, counts.unreachable, counts.aliases_max, counts.yes_no) == (ROWS, 1, 2, 0.2)
    (row,) = [
        row for row in rows(out, "train") if row["extra_info"]["reachable"] is False and row["data_source"] == "nq"
    ]
    assert len(row["reward_model"]["ground_truth"]["target"][0].split()) == 5000
    generous = built(replace(options, max_alias_words=5000, force=True))
    assert generous.outputs["train.parquet"].sets["nq"].unreachable == 0


def test_training_without_labels_says_nothing_about_them(options: Options, out: Path) -> None:
    built(replace(options, label_free=True))
    for row in rows(out, "train"):
        assert row["reward_model"] == {"style": "rule", "ground_truth": None}
        assert parse_aliases(row["reward_model"]["ground_truth"]) == []
        assert row["extra_info"]["answer_type"] is None and row["extra_info"]["reachable"] is None
    assert all(row["reward_model"]["ground_truth"] for row in rows(out, "eval"))


def test_training_without_labels_is_the_same_whatever_the_labels(tmp_path: Path, out: Path) -> None:
    """Rows, ids and sample: of labels, of what is no short answer, and of questions that differ in them alone."""
    texts = [*(f"who is {i}?" for i in range(30)), "who is 7?"]
    answers: list[list[Any]] = [[f"a {i}" for i in range(31)], ["yes"] * 31, [["x"], True, *(None,) * 29]]
    found = []
    for labels in answers:
        path = write_jsonl(
            tmp_path / "mine.jsonl", [{"question": q, "answer": a} for q, a in zip(texts, labels, strict=True)]
        )
        manifest = built(own(out, f"train={path}", label_free=True, train_per_set=9, force=True))
        found.append((rows(out, "train"), manifest.outputs["train.parquet"].sets))
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 9
    assert found[0][1]["mine"].dropped == {"duplicate": 1, "not sampled": 21}


def test_questions_of_one_text_get_ids_of_their_own(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(tmp_path / "popqa.jsonl", [{"question": "Who?", "answer": answer} for answer in "abc"])
    built(own(out, f"eval={path}"))
    first, *others = ids(out, "eval", "popqa")
    assert others == [f"{first}.2", f"{first}.3"]


def test_questions_without_answers_train_without_labels_only(tmp_path: Path, out: Path) -> None:
    bare = [{"question": "q 1", "answer": None}, {"question": "q 2", "answer": ""}, {"question": " ", "answer": "x"}]
    path = write_jsonl(tmp_path / "bare.jsonl", bare)
    with pytest.raises(SourceError, match=r"set 'bare' has no question left for train .*2 no answer.*--label-free"):
        build(own(out, f"train={path}"))
    with pytest.raises(SourceError, match="set 'bare' has no question left for eval"):
        build(own(out, f"eval={path}", label_free=True))
    counts = built(own(out, f"train={path}", label_free=True)).outputs["train.parquet"].sets["bare"]
    assert (counts.read, counts.rows, counts.dropped) == (3, 2, {"no question": 1})


def test_a_question_mark_is_added_where_one_asks_for_it(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(
        tmp_path / "nq.jsonl", [{"question": "who", "answer": "x"}, {"question": "what?", "answer": "x"}]
    )
    built(own(out, f"eval={path}"))
    assert [row["prompt"][-1]["content"] for row in rows(out, "eval")] == ["who", "what?"]
    built(own(out, f"eval={path}", question_mark="add", force=True))
    assert [row["extra_info"]["question"] for row in rows(out, "eval")] == ["who?", "what?"]


# --- what is left out ------------------------------------------------------------------------------------------------


def test_duplicates_are_equal_in_question_and_aliases(tmp_path: Path, out: Path) -> None:
    questions = [
        {"id": 1, "question": "Who directed Pilot?", "golden_answers": ["A", "B"]},
        {"id": 2, "question": "who directed  Pilot", "golden_answers": ["B", "A"]},
        {"id": 3, "question": "Who directed Pilot?", "golden_answers": ["C"]},
    ]
    path = write_jsonl(tmp_path / "popqa.jsonl", questions)
    counts = built(own(out, f"eval={path}")).outputs["eval.parquet"].sets["popqa"]
    assert (counts.rows, counts.dropped) == (2, {"duplicate": 1})
    first, second = rows(out, "eval")
    assert second["extra_info"]["id"] == "3"
    assert second["extra_info"]["duplicate_of"] == f"popqa/{first['extra_info']['id']}"
    assert built(own(out, f"eval={path}", dedupe="off", force=True)).outputs["eval.parquet"].rows == 3


def test_training_has_no_question_of_an_evaluation(tmp_path: Path, out: Path) -> None:
    train = write_jsonl(
        tmp_path / "nq.jsonl", [{"id": i, "question": f"who is no {i}", "answer": "x"} for i in range(4)]
    )
    asked = [{"id": 0, "question": "“Who” is NO 2?", "answer": "y"}, {"id": 1, "question": "who?", "answer": "y"}]
    options = own(out, f"train={train}", f"eval={write_jsonl(tmp_path / 'other.jsonl', asked)}", eval_per_set=1)
    manifest = built(options)
    assert ids(out) == ["0", "1", "3"] and manifest.decontaminated == {"nq": ["2"]}
    assert manifest.outputs["train.parquet"].sets["nq"].dropped == {"in evaluation": 1}
    # Whatever the evaluation samples.
    assert {len(ids(out)) for seed in range(4) if build(replace(options, seed=seed, force=True))} == {3}
    assert built(replace(options, decontaminate="off", force=True)).outputs["train.parquet"].rows == 4


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Who made C++?", "Who made C#?", False),
        ("Who made C?", "Who made C#?", False),
        ("What is 7-5?", "What is 75?", False),
        ("What is 7–5?", "what is 7-5", True),
        ("What costs $5?", "What costs 5?", False),
        ("Who has 5%?", "Who has 5?", False),
        ("Is it 3.5?", "Is it 35?", False),
        ("What is 1/2?", "What is 12?", False),
        ("Who had 1,000?", "Who had 1000", True),
        ("Who wrote ``Emma''?", "“Who wrote Emma”", True),
        ("What is U.S. law?", "what is us law", True),
        ("?!", "...", False),
        (" ?! ", "?!", True),
    ],
)
def test_questions_are_the_same_but_for_case_and_punctuation(one: str, other: str, same: bool) -> None:
    assert (question_key(one) == question_key(other)) is same and question_key(one)


def test_a_symbol_makes_another_question(tmp_path: Path, out: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [{"question": q, "answer": "x"} for q in ("Who made C++?", "Who is Bo?")])
    asked = write_jsonl(tmp_path / "e.jsonl", [{"question": q, "answer": "x"} for q in ("Who made C#?", "who is bo")])
    built(own(out, f"train={train}", f"eval={asked}"))
    assert [row["extra_info"]["question"] for row in rows(out, "train")] == ["Who made C++?"]


def test_sets_are_chosen_by_name(options: Options, out: Path) -> None:
    manifest = built(replace(options, train="none", eval="2wiki,Bamboogle"))
    assert list(manifest.outputs) == ["eval.parquet"] and not (out / "train.parquet").exists()
    assert list(manifest.outputs["eval.parquet"].sets) == ["2wikimultihopqa", "bamboogle"]
    assert set(manifest.licences) == {"2wikimultihopqa", "bamboogle"}
    with pytest.raises(SiopConfigError, match=r"--train musique: there is no 'musique'; choose of nq, hotpotqa, all"):
        build(replace(options, train="musique"))
    with pytest.raises(SiopConfigError, match=r"--eval nq,squad: there is no 'squad'; choose of nq, "):
        build(replace(options, eval="nq,squad"))


def test_sampling_takes_the_lowest_ranks_and_not_the_first(options: Options, out: Path) -> None:
    counts = built(replace(options, train_per_set=5, eval_per_set=3)).outputs
    assert {n.rows for n in counts["train.parquet"].sets.values()} == {5}
    assert counts["eval.parquet"].sets["nq"].dropped == {"not sampled": ROWS - 3}
    chosen = ids(out)
    assert chosen != ids(out, "eval")[:5] and chosen != [f"train_{i}" for i in range(5)]
    assert chosen == sorted(chosen, key=lambda key: int(key.partition("_")[2]))  # in the order of the source
    built(replace(options, train_per_set=8, eval_per_set=3, force=True))
    assert set(chosen) < set(ids(out))
    built(replace(options, train_per_set=5, seed=2, force=True))
    assert set(chosen) != set(ids(out))


# --- a second call ---------------------------------------------------------------------------------------------------


def test_a_second_build_finds_nothing_to_do(options: Options, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "--preset", "searchr1", "--source", *options.source, "--prompt", "bare", "--out", str(out)]
    assert main(arguments) == 0
    assert f"wrote {out}; use it with DATA_DIR={out}" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out} is up to date\n"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*arguments, "--seed", "2"]) == 2
    assert "holds other data: seed: 1 | 2 (there | asked for); choose another --out" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*arguments, "--seed", "2", "--force"]) == 0
    assert read_manifest(out).build["seed"] == 2
    assert [path.name for path in out.parent.iterdir() if path.name.startswith("out")] == ["out"]


def test_changed_sources_are_another_build(options: Options, out: Path) -> None:
    built(options)
    path = Path(options.source[0]) / "nq" / "train.jsonl"
    path.write_text(path.read_text().replace("number 7 ", "number seven "))
    with pytest.raises(FolderError, match=r"holds other data: sources.0 train nq nq/train.jsonl: [0-9a-f]{64} \| "):
        build(options)


def test_what_a_person_changed_is_not_overwritten(options: Options, out: Path) -> None:
    built(options)
    (out / "overrides.yaml").write_text("data.max_response_length: 8192\n")
    with pytest.raises(FolderError, match=r"overrides.yaml was changed after it was built; .*--force"):
        build(options)
    assert "8192" in (out / "overrides.yaml").read_text()
    (out / "overrides.yaml").unlink()
    assert build(options) is not None
    assert build(options) is None


def test_a_folder_that_is_none_of_ours_is_left_alone(options: Options, out: Path) -> None:
    out.mkdir()
    assert build(options) is not None  # an empty one is no loss
    for text, message in (("", "no manifest.json there"), ("{}", "build: Field required"), ("{", "not JSON")):
        (out / "manifest.json").unlink(missing_ok=True)
        if text:
            (out / "manifest.json").write_text(text)
        with pytest.raises(FolderError, match=rf"{message}.*choose another --out"):
            build(options)
    assert (out / "eval.parquet").exists()


# --- the manifest ----------------------------------------------------------------------------------------------------

GOLDEN = {
    "train.parquet": "f25852111251da7073c04e514bdbfa3e588a26a09015f601aa5ac60ab691878a",
    "eval.parquet": "9a5402cb49ee13c4dd514988aba060adf9e8c2ef1fc64c3931a9b2e6c870cbce",
}


def test_a_small_build_is_the_same_everywhere(options: Options) -> None:
    """The digest of the rows; raise ``VERSION`` of build.py with it."""
    manifest = built(replace(options, prompt="bare", train_per_set=10, eval_per_set=10))
    assert {name: output.rows_sha256 for name, output in manifest.outputs.items()} == GOLDEN


def test_two_builds_are_equal_to_the_byte(options: Options, out: Path, tmp_path: Path) -> None:
    built(options)
    built(replace(options, out=tmp_path / "other"))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_folder_is_checked_against_its_manifest(
    options: Options, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built(options)
    assert main(["check", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out} is as it was built" in shown and "1 (5.0%)" in shown
    content = pq.read_table(out / "eval.parquet").to_pylist()
    content[0]["reward_model"]["ground_truth"]["target"] = ["another"]
    write_parquet(out / "eval.parquet", content)
    with pytest.raises(FolderError, match=r"eval.parquet is changed"):
        check_folder(out)
    # Nor do other rows pass under a digest that somebody has written by hand.
    pq.write_table(pa.Table.from_pylist(content, SCHEMA), out / "eval.parquet")
    (digest, _), manifest = digests(out / "eval.parquet"), read_manifest(out)
    manifest.outputs["eval.parquet"].sha256 = digest
    (out / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(FolderError, match=r"eval.parquet: its 140 rows are not the 140 of manifest.json"):
        check_folder(out)
    (out / "eval.parquet").unlink()
    assert main(["check", str(out)]) == 2
    assert "eval.parquet is missing" in capsys.readouterr().err


def test_diff_says_why_two_folders_differ(
    options: Options, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built(options)
    other = tmp_path / "other"
    built(replace(options, out=other))
    assert compare(out, other) == [] and main(["diff", str(out), str(other)]) == 0
    path = Path(options.source[0]) / "nq" / "test.jsonl"
    changed = made_up("nq", "test")
    changed[4]["golden_answers"] = ["somebody else"]
    write_jsonl(path, changed)
    built(replace(options, out=other, train_per_set=10, prompt="hermes-thinking", force=True))
    capsys.readouterr()
    assert main(["diff", str(out), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "build.train_per_set: 0 | 10" in lines
    assert any(line.startswith("sources.eval nq/test.jsonl.sha256: ") for line in lines)
    assert "prompt.name: hermes-instruct | hermes-thinking" in lines
    assert f"train.parquet: 20 rows only in {out}" in "\n".join(lines)
    assert "outputs.train.parquet.sets.nq.rows: 20 | 10" in lines
    differs = "eval.parquet: reward_model.ground_truth.target differs in 1 rows: nq/test/test_4"
    assert any(line.startswith(differs) for line in lines)


def test_searchr1_rows_of_one_file_are_read_by_their_own_columns(tmp_path: Path, out: Path) -> None:
    """The prompt's instructions and the ground truth of another spelling are not what is read."""
    row = searchr1_row("nq", "test", made_up("nq", "test", 1)[0], 0)
    built(own(out, f"eval={write_parquet(tmp_path / 'x.parquet', [row])}"))
    assert rows(out, "eval")[0]["prompt"][-1]["content"] == "who is number 0 in the test part of nq?"


def test_questions_alone_are_for_training_without_labels(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(tmp_path / "asked.jsonl", [{"question": f"Who wrote book {i}?"} for i in range(5)])
    with pytest.raises(SourceError, match=r"set 'asked' has no question left for train .*5 no answer.*--label-free"):
        build(own(out, f"train={path}"))
    built(own(out, f"train={path}", label_free=True))
    assert [row["extra_info"]["question"] for row in rows(out, "train")] == [f"Who wrote book {i}?" for i in range(5)]


@pytest.mark.parametrize(
    ("prompt", "noted"),
    [
        ({"user": "Short, please: {question}"}, True),
        ({"system": "Give it in <answer> and </answer>."}, False),
    ],
)
def test_a_prompt_that_asks_for_no_tags_is_noted(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], prompt: dict[str, str], noted: bool
) -> None:
    own_prompt = tmp_path / "own.yaml"
    own_prompt.write_text(json.dumps(prompt))
    path = write_jsonl(tmp_path / "asked.jsonl", [{"question": "Who?", "answer": "Ada"}])
    assert main(["build", "--source", f"train={path}", "--prompt", str(own_prompt), "--out", str(out)]) == 0
    assert ("does not ask for <answer>" in capsys.readouterr().out) == noted
