"""What several runs say together."""

from typing import Any

from benchmarks.seeds import missed, pooled
from evolve.evaluate import Found, Record, Sample


def run(name: str, greedy: list[float], covered: list[int]) -> dict[str, Any]:
    def entry(number: int, value: float) -> dict[str, Any]:
        found: dict[str, Any] = {"round": number, "evaluation": {"rows": []}}
        found["evaluation"]["rows"].append({"method": "greedy", "accuracy": {"value": value}})
        if number:
            found["search"] = {"solved": covered[number - 1], "problems": 100}
        return found

    return {"run": name, "rounds": [entry(number, value) for number, value in enumerate(greedy)]}


AHEAD = {k: [{"minus": "majority", "low": 0.01}, {"minus": "log-probability", "low": -0.1}] for k in (1, 2)}


def test_a_run_that_holds_every_goal_misses_none() -> None:
    assert missed([run("a", [0.2, 0.4, 0.5, 0.5, 0.49], [40, 50, 60, 61])], AHEAD) == []


def test_every_missed_goal_is_named_with_its_run() -> None:
    reports = [
        run("flat", [0.2, 0.4, 0.4, 0.5, 0.6], [40, 50, 60, 70]),
        run("weak", [0.3, 0.4, 0.5, 0.5, 0.59], [40, 50, 60, 70]),
        run("stuck", [0.2, 0.4, 0.5, 0.5, 0.6], [40, 50, 50, 70]),
    ]
    behind = {**AHEAD, 2: [{"minus": "majority", "low": -0.01}, {"minus": "log-probability", "low": 0.1}]}
    complaints = missed(reports, behind)
    assert [complaint.split(":")[0] for complaint in complaints] == ["flat", "weak", "stuck", "round 2"]


def test_a_method_is_compared_on_the_problems_it_was_run_on() -> None:
    def record(right_score: float, beam: bool | None) -> Record:
        samples = [
            Sample(False, 0, 5, -1.0, 0.0),
            Sample(False, 0, 5, -2.0, 0.0),
            Sample(True, 2, 5, -3.0, right_score),
        ]
        found = None if beam is None else Found(beam, 5, 5)
        return Record("p", 1, False, 5, samples, beam=found)

    by_name = {
        (row["method"], row["minus"]): row for row in pooled([record(1.0, True), record(1.0, None), record(-1.0, None)])
    }
    assert by_name["PPM best-of-N", "majority"]["value"] == 2 / 3
    assert by_name["PPM best-of-N", "majority"]["problems"] == 3
    assert by_name["PPM beam", "log-probability"]["value"] == 1.0
    assert by_name["PPM beam", "log-probability"]["problems"] == 1
    assert ("PPM-guided MCTS", "majority") not in by_name
