"""Problem sets: what is wrong is named by line, and nothing held out is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evolve.config import load
from evolve.problems import ProblemsError, for_round, load_problems, normalised


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def rows(count: int, stem: str = "What is") -> list[dict]:
    return [{"id": f"p{i}", "problem": f"{stem} {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


def config(path: Path | str, *more: str):
    settings = {"problems.per_round": "null", "problems.test_size": "2"} | dict(m.split("=", 1) for m in more)
    return load([f"problems.path={path}", *(f"{key}={value}" for key, value in settings.items())])


def errors(path: Path | str, *more: str) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        load_problems(config(path, *more))
    return list(caught.value.errors)


def test_json_lines_parquet_and_data_sets_hold_the_same_problems(tmp_path):
    import datasets

    table = rows(6)
    json_lines = write(tmp_path / "a.jsonl", table)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    datasets.Dataset.from_list(table).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", table)
    digests = {
        load_problems(config(source)).digest()
        for source in (json_lines, tmp_path / "a.parquet", tmp_path / "saved", tmp_path / "folder")
    }
    assert len(digests) == 1


def test_fields_are_mapped_and_values_read(tmp_path):
    source = write(
        tmp_path / "m.jsonl",
        [
            {"q": "a?", "gold": ["1/2", "0.5"], "level": "Level 3", "made": True},
            {"q": "b?", "gold": 7, "level": 2},
            {"q": "c?", "gold": 0.25},
        ],
    )
    fields = [f"problems.fields.{k}={v}" for k, v in {"question": "q", "answer": "gold", "synthetic": "made"}.items()]
    found = load_problems(config(source, *fields, "problems.fields.difficulty=level", "problems.test_size=1"))
    by_question = {p.question: p for p in (*found.train, *found.test)}
    assert by_question["a?"].answers == ("1/2", "0.5")
    assert (by_question["a?"].difficulty, by_question["a?"].synthetic) == (3, True)
    assert by_question["b?"].answers == ("7",)
    assert by_question["b?"].difficulty == 2
    assert by_question["c?"].answers == ("0.25",)
    assert {p.id for p in by_question.values()} == {"m-0", "m-1", "m-2"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{broken", "malformed JSON"),
        ("[1]", "not an object"),
        ({"answer": "1"}, "no column 'problem'"),
        ({"problem": "q?"}, "no column 'answer'"),
        ({"problem": "  ", "answer": "1"}, "question is empty"),
        ({"problem": 7, "answer": "1"}, "question is a int, not text"),
        ({"problem": "", "answer": "1"}, "question is empty"),
        ({"problem": "q?", "answer": ""}, "answer is empty"),
        ({"problem": "q?", "answer": None}, "answer is missing"),
        ({"problem": "q?", "answer": []}, "list of answers is empty"),
        ({"problem": "q?", "answer": ["1", ""]}, "answer is empty"),
        ({"problem": "q?", "answer": True}, "answer is a bool"),
        ({"problem": "q?", "answer": {"a": 1}}, "answer is a dict"),
        ('{"problem": "q?", "answer": NaN}', "cannot be graded"),
        ({"problem": "q?", "answer": "\\frac{1}{2"}, "braces"),
        ({"problem": "q?", "answer": "because " * 100}, "not the solution"),
        ({"problem": "q?", "answer": "1", "id": "p1"}, "also that of bad.jsonl:2"),
        ({"problem": "q?", "answer": "1", "id": 1.5}, "neither text nor a whole number"),
        ({"problem": "q?", "answer": "1", "difficulty": "hard"}, "difficulty 'hard'"),
        ({"problem": "q?", "answer": "1", "synthetic": "maybe"}, "must be true or false"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, row, complaint):
    found = errors(write(tmp_path / "bad.jsonl", [*rows(5), row]))
    assert len(found) == 1
    assert found[0].startswith("bad.jsonl:6: ")
    assert complaint in found[0]


def test_all_bad_rows_are_reported_together(tmp_path):
    bad = [{"problem": "", "answer": "1"}, "{", *rows(2), {"problem": "q", "answer": ""}]
    assert [e.split(":")[1] for e in errors(write(tmp_path / "bad.jsonl", bad))] == ["1", "2", "5"]


def test_a_message_of_thousands_of_errors_stays_readable(tmp_path):
    with pytest.raises(ProblemsError, match="3000 errors") as caught:
        load_problems(config(write(tmp_path / "bad.jsonl", ["{"] * 3000)))
    assert len(str(caught.value).splitlines()) < 30


def test_duplicate_questions_and_blank_lines_are_legal_and_noted(tmp_path):
    same = {"problem": "WHAT is  1 + 1?", "answer": "3", "id": "again"}
    found = load_problems(config(write(tmp_path / "d.jsonl", [*rows(6), "", same])))
    assert "again" in {p.id for p in found.train}
    notes = "\n".join(found.notes)
    assert "d.jsonl:2 = d.jsonl:8" in notes
    assert "different answers" in notes
    assert "1 blank lines skipped: d.jsonl:7" in notes


@pytest.mark.parametrize("path", ["nowhere.jsonl", "nowhere.parquet"])
def test_missing_files_are_an_error(tmp_path, path):
    assert len(errors(tmp_path / path)) == 1


def test_unknown_kinds_of_file_are_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    assert "unknown kind of file" in errors(tmp_path / "a.csv")[0]


def test_empty_set_is_an_error(tmp_path):
    assert "no problems" in errors(write(tmp_path / "empty.jsonl", []))[0]


def test_held_out_problems_are_disjoint_deterministic_and_drawn_by_the_seed(tmp_path):
    source = write(tmp_path / "a.jsonl", rows(50))
    one, two, other = (load_problems(config(source, "problems.test_size=10", f"run.seed={s}")) for s in (0, 0, 1))
    assert one == two
    assert {p.id for p in one.test} != {p.id for p in other.test}
    assert (len(one.train), len(one.test)) == (40, 10)
    assert not {normalised(p.question) for p in one.train} & {normalised(p.question) for p in one.test}


def test_held_out_problems_do_not_depend_on_the_order_of_rows(tmp_path):
    one = load_problems(config(write(tmp_path / "a.jsonl", rows(50))))
    two = load_problems(config(write(tmp_path / "b.jsonl", rows(50)[::-1])))
    assert {p.id for p in one.test} == {p.id for p in two.test}


def test_a_question_that_stands_twice_is_never_held_out(tmp_path):
    twice = [{"id": f"again{i}", "problem": "what IS 1 +\n1?", "answer": "2"} for i in range(40)]
    found = load_problems(config(write(tmp_path / "a.jsonl", [*rows(5), *twice])))
    assert "what is 1 + 1?" not in {normalised(p.question) for p in found.test}


def test_held_out_file_takes_its_problems_out_of_training(tmp_path):
    train = write(tmp_path / "train.jsonl", rows(6))
    test = write(tmp_path / "test.jsonl", [{"problem": "WHAT is 3 + 3?", "answer": "6"}])
    found = load_problems(config(train, f"problems.test_path={test}"))
    assert [p.id for p in found.test] == ["test-0"]
    assert "p3" not in {p.id for p in found.train}
    assert "p3" in found.notes[0]


def test_one_id_for_two_problems_across_the_split_is_an_error(tmp_path):
    train = write(tmp_path / "train.jsonl", rows(6))
    test = write(tmp_path / "test.jsonl", rows(1, stem="Compute"))
    assert "p0" in errors(train, f"problems.test_path={test}")[0]


def test_holding_out_everything_is_an_error(tmp_path):
    source = write(tmp_path / "a.jsonl", rows(6))
    assert "problems.test_size=6" in errors(source, "problems.test_size=6")[0]
    assert "all training problems" in errors(source, f"problems.test_path={source}")[0]


def test_limit_takes_the_first_training_problems(tmp_path):
    source = write(tmp_path / "a.jsonl", rows(20))
    everything = load_problems(config(source)).train
    assert load_problems(config(source, "problems.limit=5")).train == everything[:5]


def test_rounds_take_fresh_problems_until_there_are_none(tmp_path):
    source = write(tmp_path / "a.jsonl", rows(22))
    fresh = load_problems(config(source, "problems.per_round=5"))
    slices = [{p.id for p in for_round(fresh, k)} for k in (1, 2, 3, 4)]
    assert [len(s) for s in slices] == [5, 5, 5, 5]
    assert len(set.union(*slices)) == 20
    with pytest.raises(ProblemsError, match="round 5 has no problems left"):
        for_round(fresh, 5)
    everything = load_problems(config(source))
    assert for_round(everything, 4) == everything.train


def test_too_few_problems_for_the_rounds_are_refused_before_the_start(tmp_path):
    source = write(tmp_path / "a.jsonl", rows(12))
    assert "round 3 has no problems" in errors(source, "problems.per_round=5")[0]
    one = load_problems(config(source, "problems.per_round=50", "round=1"))
    assert len(for_round(one, 1)) == 10
    assert "round 1 has 10 fresh problems, not 50" in one.notes[0]


def test_slices_of_a_sorted_file_are_alike(tmp_path):
    table = [row | {"difficulty": 1 + i // 100} for i, row in enumerate(rows(402))]
    found = load_problems(config(write(tmp_path / "a.jsonl", table), "problems.per_round=100"))
    easy = [sum(p.difficulty == 1 for p in for_round(found, k)) for k in (1, 2, 3, 4)]
    assert all(10 <= count <= 40 for count in easy), easy


def test_tiny_world_gives_every_round_fresh_problems_and_a_disjoint_test_split():
    settings = ["conf=smoke", "problems.per_round=30", "problems.test_size=20"]
    found = load_problems(load(settings))
    assert (len(found.train), len(found.test)) == (60, 20)
    assert not {p.id for p in for_round(found, 1)} & {p.id for p in for_round(found, 2)}
    assert found.digest() == load_problems(load(settings)).digest()
    assert found.digest() != load_problems(load([*settings, "run.seed=1"])).digest()
