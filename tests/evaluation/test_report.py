"""The tables of evaluations, and what is refused: half an evaluation, and a comparison of unlike ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verl.trainer.siop import report
from verl.trainer.siop.evaluation.compare import check_comparable, compare
from verl.trainer.siop.evaluation.manifest import read_evaluation, read_manifest
from verl.trainer.siop.evaluation.questions import EvaluationError, Sample
from verl.trainer.siop.evaluation.statistics import bootstrap
from verl.trainer.siop.evaluation.summary import summarise
from verl.trainer.siop.evaluation.tables import comparison_table

Made = Callable[..., Sample]
Sections = dict[str, Any]


# --- summaries --------------------------------------------------------------------------------------------------------


def test_a_question_counts_once_and_a_set_once(made: Made) -> None:
    samples = [
        *(made("nq", "a", em, sample=i) for i, em in enumerate([1.0, 0.0, 0.0, 0.0])),
        *(made("nq", "b", 0.0, sample=i) for i in range(4)),
        *(made("tq", "a", 1.0, sample=i, searches=3, turns=4) for i in range(4)),
    ]
    sets, average = summarise(samples)
    assert (sets["nq"].questions, sets["nq"].samples, average.questions, average.samples) == (2, 8, 3, 12)
    assert sets["nq"].scores["em"].value == 1 / 8 and sets["nq"].scores["pass"].value == 1 / 2
    assert average.scores["em"].value == (1 / 8 + 1) / 2 and average.scores["pass"].value == 3 / 4
    assert sets["nq"].scores["f1"].value == pytest.approx((0.625 + 0.5) / 2)
    assert average.means["searches"] == 2 and average.means["turns"] == 3
    # The interval is over the means of questions, not over samples.
    ends, _ = bootstrap({"nq": np.array([[0.25], [0.0]])})
    assert (sets["nq"].scores["em"].low, sets["nq"].scores["em"].high) == tuple(ends["nq"][:, 0])
    assert sets["tq"].scores["em"].low is None


def test_what_is_not_known_is_left_out(made: Made) -> None:
    samples = [
        made("nq", "a", 1.0, reachable=True),
        made("nq", "b", 0.0, reachable=False),
        made("nq", "c", None, reachable=None, searches=None, truncated=None),
        made("none", "a", None, searches=None, truncated=None, failed_searches=None),
    ]
    sets, average = summarise(samples)
    assert (sets["nq"].labelled, sets["nq"].questions) == (2, 3)
    assert sets["nq"].scores["em"].value == 0.5 and sets["nq"].unreachable == 0.5 and "pass" not in sets["nq"].scores
    assert sets["none"].scores == {} and sets["none"].unreachable is None and sets["none"].means["searches"] is None
    assert average.scores["em"].value == 0.5 and average.unreachable == 0.5 and average.means["truncated"] == 0
    _, nothing = summarise([made("none", "a", None)])
    assert nothing.scores == {}


# --- the table --------------------------------------------------------------------------------------------------------

TABLE = """\
data source  n     EM            95 %     F1            95 %  F1 release            95 %  unreachable
nq           4  0.500  [0.000, 1.000]  0.750  [0.500, 1.000]       0.375  [0.250, 0.500]        0.250
tq\\x1b[31m   1  1.000               -  1.000               -       0.500               -            -
average      5  0.750  [0.500, 1.000]  0.875  [0.750, 1.000]       0.438  [0.375, 0.500]        0.250

data source  no answer  truncated  turn limit  searches  failed  turns  tokens
nq               0.250      0.000       0.000      1.00    0.00   2.00   30.00
tq\\x1b[31m       0.000          -       0.000         -    0.00   2.00   30.00
average          0.125      0.000       0.000      1.00    0.00   2.00   30.00
mean turns 2.00, mean response tokens 30.0
"""


@pytest.mark.parametrize("inner", ["", "validation"])
def test_the_table_of_an_evaluation(
    inner: str, tmp_path: Path, made: Made, write: Any, sections: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        *(made("nq", name, float(name in "ab"), reachable=name != "d", no_answer=name == "d") for name in "abcd"),
        # The name of a set comes from the data; a terminal would obey it.
        made("tq\x1b[31m", "a", 1.0, searches=None, truncated=None, answer="\x1b[2J"),
    ]
    write(tmp_path / inner, samples, sections)
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == TABLE


def test_several_samples_of_a_question_have_columns_of_their_own(
    tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    samples = [made("nq", name, em, sample=i) for name in "ab" for i, em in enumerate([1.0, 0.0])]
    sections["decoding"]["n"] = 2
    sections["retriever"] = {"http://h/retrieve": None}
    write(tmp_path, samples, sections)
    text = report.report(tmp_path)
    assert text.split("\n")[0].split()[:6] == ["data", "source", "n", "EM", "avg@2", "95"] and "pass@2" in text
    assert text.split("\n")[1].split()[:4] == ["nq", "2", "0.500", "-"]
    assert "http://h/retrieve does not say what it serves" in text


# --- half an evaluation -----------------------------------------------------------------------------------------------


def test_a_folder_without_a_finished_evaluation_is_refused_by_name(
    tmp_path: Path, made: Made, write: Any, sections: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "eval"
    write(folder, [made("nq", "a")], sections)
    (folder / "manifest.json").unlink()
    (folder / "metrics.json").write_text("{}")
    for command in ([str(folder)], ["compare", str(folder), str(folder)]):
        assert report.main(command) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and f"error: {folder} holds no finished evaluation (manifest.json" in printed.err


def test_questions_of_another_evaluation_are_refused(
    tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    write(tmp_path, [made("nq", "a")], sections)
    manifest = (tmp_path / "manifest.json").read_text()
    write(tmp_path, [made("nq", "b")], sections)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(EvaluationError, match=r"questions.jsonl is not the file that manifest.json was written for"):
        report.report(tmp_path)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"has no questions.jsonl"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace('"format": 1', '"format": 2')])
def test_a_damaged_manifest_is_refused(
    damage: Callable[[str], str], tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    write(tmp_path, [made("nq", "a")], sections)
    file = tmp_path / "manifest.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(EvaluationError, match="damaged or of another version"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("decoding", "n", "decoding: Value error, needs n \\(int\\), got None"),
        ("model", "checkpoint", "model: Value error, needs checkpoint \\(str\\), got None"),
    ],
)
def test_what_a_table_shows_must_be_there(
    section: str, key: str, message: str, tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    write(tmp_path, [made("nq", "a")], sections)
    file = tmp_path / "manifest.json"
    found = json.loads(file.read_text())
    del found[section][key]
    file.write_text(json.dumps(found))
    for show in (report.report, lambda folder: report.report_comparison(folder, folder, [])):
        with pytest.raises(EvaluationError, match=message):
            show(tmp_path)


def test_no_number_of_the_manifest_is_trusted(tmp_path: Path, made: Made, write: Any, sections: Sections) -> None:
    write(tmp_path, [made("nq", "a", 1.0), made("nq", "b", 0.0)], sections)
    file = tmp_path / "manifest.json"
    whole, table = file.read_text(), report.report(tmp_path)
    for name, value in (("sets.nq.scores.em.value", 0.99), ("average.questions", 7), ("average.means.turns", None)):
        found = json.loads(whole)
        *path, last = name.split(".")
        inner = found
        for key in path:
            inner = inner[key]
        inner[last] = value
        file.write_text(json.dumps(found))
        with pytest.raises(EvaluationError, match=rf"manifest.json: {name} is {value}, but questions.jsonl gives "):
            report.report(tmp_path)
    found = json.loads(whole)
    del found["sets"]["nq"]["means"]["turns"]
    file.write_text(json.dumps(found))
    with pytest.raises(EvaluationError, match=r"sets.nq.means.turns is missing, but questions.jsonl gives 2.0"):
        report.report(tmp_path)
    # Intervals are drawn: those of another version of numpy may differ, and are drawn again.
    found = json.loads(whole)
    found["sets"]["nq"]["scores"]["em"]["low"] = 0.49
    file.write_text(json.dumps(found))
    assert report.report(tmp_path) == table


def test_an_evaluation_without_samples_is_refused(tmp_path: Path, write: Any, sections: Sections) -> None:
    write(tmp_path, [], sections)
    with pytest.raises(EvaluationError, match=r"questions.jsonl: no sample of a question stands there"):
        report.report(tmp_path)


def test_a_path_that_is_no_utf8_is_written_and_read(tmp_path: Path, made: Made, write: Any, sections: Sections) -> None:
    sections["model"]["checkpoint"] = "/runs/\udcff"
    write(tmp_path, [made("nq", "a")], sections)
    assert read_manifest(tmp_path).model == sections["model"]
    assert "A: /runs/\\udcff\n" in report.report_comparison(tmp_path, tmp_path, [])


# --- comparisons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("metrics", None, 3, r"metrics: 2 \| 3"),
        ("data", "sha256", ["9b"], r"data\.sha256: \['1b'\] \| \['9b'\]"),
        ("data", "ids_sha256", "9c", r"data\.ids_sha256: '2c' \| '9c'"),
        ("tokenizer", "sha256", "9d", r"tokenizer\.sha256: '3d' \| '9d'"),
        ("tokenizer", "chat_template_sha256", "9e", r"tokenizer\.chat_template_sha256"),
        ("tokenizer", "chat_template_kwargs", {"enable_thinking": False}, r"kwargs\.enable_thinking: nothing \| False"),
        ("prompt", "messages_sha256", "9f", r"prompt\.messages_sha256"),
        ("probe", "prefix", "<think>", r"probe\.prefix: '<answer>' \| '<think>'"),
        ("decoding", "n", 4, r"decoding\.n: 1 \| 4"),
        ("decoding", "temperature", 0.7, r"decoding\.temperature: 0 \| 0\.7"),
        ("decoding", "max_assistant_turns", 10, r"decoding\.max_assistant_turns: 5 \| 10"),
        ("tools", "search", {"schema_sha256": "61"}, r"tools\.search\.schema_sha256: '60' \| '61'"),
        ("retriever", "http://127.0.0.1:8000/retrieve", {"documents": 8}, r"retriever\.documents: 9 \| 8"),
        ("retriever", "http://127.0.0.1:8000/retrieve", None, r"retriever: nothing \| \[None\]"),
        ("versions", "torch", "2.12.0", r"versions\.torch: '2\.11\.0' \| '2\.12\.0'"),
        ("versions", "vllm", "0.28.0", r"versions\.vllm: nothing \| '0\.28\.0'"),
    ],
)
def test_unlike_evaluations_are_refused_by_the_field_with_both_values(
    section: str, key: str | None, value: Any, named: str, tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    a = write(tmp_path / "a", [made("nq", "a")], sections)
    sections[section] = value if key is None else {**sections[section], key: value}
    b = write(tmp_path / "b", [made("nq", "a")], sections)
    with pytest.raises(EvaluationError, match=named):
        check_comparable(a, b)
    assert all(name.startswith(section) for name in check_comparable(a, b, [section]))
    other = "probe" if section != "probe" else "tools"
    with pytest.raises(EvaluationError, match=named):
        check_comparable(a, b, [other])


def test_the_model_the_seed_and_where_things_are_may_differ(
    tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    a = write(tmp_path / "a", [made("nq", "a")], sections)
    sections["model"] = {"checkpoint": "elsewhere", "step": None, "weights": "ff"}
    sections["decoding"]["seed"] = 2
    sections["data"] |= {"files": ["/there/test.parquet"], "manifest_sha256": ["x"]}
    sections["retriever"] = {f"http://h{i}/retrieve": {"documents": 9, "corpus_sha256": "71"} for i in range(2)}
    assert check_comparable(a, write(tmp_path / "b", [made("nq", "a")], sections)) == []


def test_fields_are_allowed_one_by_one_and_by_section(
    tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    a = write(tmp_path / "a", [made("nq", "a")], sections)
    sections["versions"] = {"verl": "0.9.2", "torch": "2.12.0"}
    b = write(tmp_path / "b", [made("nq", "a")], sections)
    with pytest.raises(EvaluationError, match=r"verl: '0.9.1' \| '0.9.2'") as error:
        check_comparable(a, b, ["versions.torch"])
    assert "2.12.0" not in str(error.value) and str(error.value).endswith("--allow versions.verl")
    assert check_comparable(a, b, ["versions"]) == ["versions.torch", "versions.verl"]
    with pytest.raises(EvaluationError, match=r"--allow version: no such field; there are data.ids_sha256, .*"):
        check_comparable(a, b, ["version"])


def test_what_searched_nobody_knows_is_unlike_itself(
    tmp_path: Path, made: Made, write: Any, sections: Sections
) -> None:
    sections["retriever"] = {"http://h/retrieve": None}
    a = write(tmp_path, [made("nq", "a")], sections)
    with pytest.raises(EvaluationError, match=r"retriever: \[None\] \| \[None\]"):
        check_comparable(a, a)
    assert check_comparable(a, a, ["retriever"]) == ["retriever"]
    sections["retriever"] = {"http://h/retrieve": {"documents": 9}, "https://web/search": None}
    both = write(tmp_path, [made("nq", "a")], sections)
    with pytest.raises(EvaluationError, match=r"retriever: \[None, \{'documents': 9\}\] \| "):
        check_comparable(both, both)
    sections["retriever"] = {}
    without = write(tmp_path, [made("nq", "a")], sections)
    assert check_comparable(without, without) == []


def test_differences_are_paired_by_question(made: Made) -> None:
    a = [made("nq", str(i), float(i % 2 == 0)) for i in range(40)] + [made("tq", "0", 1.0)]
    # In another order; five questions won, one lost.
    won, lost = {"1", "3", "5", "7", "9"}, {"0"}
    b = [
        s.model_copy(update={"em": 1.0 if s.id in won else 0.0 if s.id in lost and s.data_source == "nq" else s.em})
        for s in reversed(a)
    ]
    found = compare(a, b)
    nq, em = found.sets["nq"], found.sets["nq"].scores["em"]
    assert (nq.questions, nq.only_a, nq.only_b, nq.p) == (40, 1, 5, 0.21875)
    assert (em.a, em.b, em.change.value) == (0.5, 0.6, pytest.approx(0.1))
    changes = np.repeat([1.0, -1.0, 0.0], [5, 1, 34])[:, None]
    ends, _ = bootstrap({"nq": changes})
    assert (em.change.low, em.change.high) == tuple(ends["nq"][:, 0])
    # Narrower than without pairs, where either share alone has an error of .08.
    assert 0.15 < ends["nq"][1, 0] - ends["nq"][0, 0] < 0.25
    assert nq.scores["f1"].change.value == 0 and nq.scores["f1"].change.low is None
    average = found.average
    assert average.scores["em"].change.value == pytest.approx(0.05) and average.questions == 41
    assert (average.only_a, average.only_b, found.left_out) == (1, 5, (0, 0))


def test_questions_of_one_evaluation_alone_are_left_out_and_counted(made: Made) -> None:
    a = [made("nq", "a", 1.0), made("nq", "b", 1.0), made("nq", "c", None), made("nq", "d", 1.0)]
    found = compare(a, [made("nq", "b", 0.0), made("nq", "c", None), made("tq", "a", 1.0)])
    assert found.sets["nq"].questions == 1 and found.left_out == (2, 1) and "tq" not in found.sets
    with pytest.raises(EvaluationError, match="no question was scored in both"):
        compare(a, [made("tq", "a")])


def test_questions_that_share_an_id_alone_are_not_paired(made: Made) -> None:
    a = [made("nq", str(i), 1.0, question=f"capital of {i}") for i in range(5)]
    b = [made("nq", str(i), 0.0, question=f"founder of {i}") for i in range(5)]
    with pytest.raises(EvaluationError, match="no question was scored in both"):
        compare(a, b)
    found = compare(a, [*b[:3], *a[3:]])
    assert found.sets["nq"].questions == 2 and found.left_out == (3, 3)


def test_several_samples_are_compared_by_the_means_of_questions(made: Made) -> None:
    def samples(*ems: tuple[float, float]) -> list[Sample]:
        return [made("nq", str(q), em, sample=i) for q, both in enumerate(ems) for i, em in enumerate(both)]

    compared = compare(samples((1, 0), (0, 0), (1, 1)), samples((1, 1), (0, 1), (1, 1)))
    assert "p 0.5000 (sign test on the means of questions)" in comparison_table(compared)
    found = compared.sets["nq"]
    assert found.scores["em"].change.value == pytest.approx(1 / 3) and (found.only_a, found.only_b) == (0, 2)
    assert found.p == 0.5


COMPARED = """\
A: runs/a/global_step_7
B: runs/b\\nx
differing, as allowed: versions.torch

data source  n   EM A   EM B   B - A             95 %  only A  only B       p
nq           4  0.500  0.750  +0.250  [-0.500, 1.000]       1       2  1.0000
tq           1  1.000  1.000  +0.000                -       0       0  1.0000
average      5  0.750  0.875  +0.125  [-0.250, 0.500]       -       -       -

data source  n   F1 A   F1 B   B - A             95 %
nq           4  0.750  0.875  +0.125  [-0.250, 0.500]
tq           1  1.000  1.000  +0.000                -
average      5  0.875  0.938  +0.062  [-0.125, 0.250]

data source  n  F1 release A  F1 release B   B - A             95 %
nq           4         0.375         0.438  +0.062  [-0.125, 0.250]
tq           1         0.500         0.500  +0.000                -
average      5         0.438         0.469  +0.031  [-0.062, 0.125]

all 5 questions: EM higher in A 1, in B 2, p 1.0000 (McNemar's exact test)
"""


def test_the_command_compares(
    tmp_path: Path, made: Made, write: Any, sections: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", [*(made("nq", x, float(x in "ab")) for x in "abcd"), made("tq", "a", 1.0)], sections)
    sections["model"] = {"checkpoint": "runs/b\nx"}
    sections["versions"]["torch"] = "2.12.0\x1b[2J"
    write(tmp_path / "b", [*(made("nq", x, float(x in "bcd")) for x in "abcd"), made("tq", "a", 1.0)], sections)
    command = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert report.main(command) == 1
    refused = capsys.readouterr()
    assert refused.out == "" and r"versions.torch: '2.11.0' | '2.12.0\x1b[2J'" in refused.err
    assert report.main([*command, "--allow", "versions.torch"]) == 0
    assert capsys.readouterr().out == COMPARED


def test_the_manifest_is_json_that_others_read(tmp_path: Path, made: Made, write: Any, sections: Sections) -> None:
    write(tmp_path, [made("nq", "a", 1.0), made("nq", "b", 0.0)], sections)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["sets"]["nq"]["scores"]["em"]["value"] == 0.5 and found["average"]["questions"] == 2
