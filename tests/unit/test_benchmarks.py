"""The benchmarks' command: its verbs and options, and the measures of the code's shape."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import VERBS, arguments
from benchmarks.cost import LOAD_GENERATOR, Used, cost_rows, per_token_us, spent, used
from benchmarks.load import Summary
from benchmarks.report import Measurement, summarise
from benchmarks.shape import measure

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments([verb, "--help"])
    assert ended.value.code == 0 and ("--json" in capsys.readouterr().out or verb == "memory")


def test_an_option_is_taken_by_its_whole_name_only() -> None:
    assert arguments(["tide", "--seconds", "60"]).seconds == 60
    with pytest.raises(SystemExit):
        arguments(["tide", "--sec", "60"])


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_rooms_imports_and_circles_are_counted(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "cluster/__init__.py": "",
            "cluster/types.py": "class A:\n    x = 1\n",
            "cluster/store/__init__.py": "",
            "cluster/store/objects.py": "from cluster.types import A\n\n\ndef get() -> A:\n    return A()\n",
            "cluster/store/registry.py": "from cluster.store import objects\nfrom cluster.control.actor import run\n",
            "cluster/control/__init__.py": "",
            "cluster/control/actor.py": "def run():\n    from cluster.store.registry import x\n    ray._private.f(x)\n",
            "README.md": "five words are in this\n",
        },
    )
    found = measure(tmp_path)
    assert found["functions"] == {"pieces": 2, "median": 2.5, "p95": 3, "longest": 3, "name": "cluster/control/actor.py:run"}
    assert found["rooms"]["between"]["cluster.store"] == ["cluster.control", "cluster.types"]
    assert found["rooms"]["room_circles"] == [["cluster.control", "cluster.store"]]
    assert found["rooms"]["module_levels"] == 3, "the circle of two modules is one level"
    assert found["private_touches"] == ["cluster/control/actor.py:3 ray._private"]
    assert found["readme_words"] == 5


def test_this_checkout_can_be_measured_and_has_no_circle_of_rooms() -> None:
    found = measure(ROOT)
    assert json.loads(json.dumps(found)) == found
    assert found["rooms"]["room_circles"] == []


def test_processor_time_is_counted_per_process_and_token() -> None:
    before = {1: Used("engine", 2.0), 2: Used("gateway", 1.0), 3: Used("ended", 4.0)}
    after = {1: Used("engine", 2.6), 2: Used("gateway", 1.1), 4: Used("engine", 0.2), 5: Used("raylet", 0.0001)}
    assert per_token_us(spent(before, after), 1000) == pytest.approx({"engine": 800, "gateway": 100, "raylet": 0.1})
    assert spent({1: Used("ray::IDLE", 5.0)}, {1: Used("ray::Control", 6.0)}) == {"ray::Control": 1.0}, "Ray renames its workers"
    assert per_token_us({"engine": 1.0}, 0) == {}


def test_costs_are_medians_over_rounds_with_their_spread() -> None:
    rows = list(cost_rows({"gateway": [40, 50, 60], "engine": [300, 290, 310], "raylet": [0.1, 0.2, 0.3]}))
    assert rows == [("engine", "300 (290–310)"), ("gateway", "50 (40–60)"), ("1 others", "0 (0–0)")]
    assert list(cost_rows({})) == []


def test_this_process_is_the_load_generator_of_its_own_tree() -> None:
    import psutil

    names = [one.name for one in used(psutil.Process()).values()]
    assert LOAD_GENERATOR in names


def test_a_row_says_what_each_process_spent() -> None:
    summary = Summary(1.0, 32.0, None, None, None, None, 0)
    two = [Measurement(turn, "springtide", 32, True, summary, {"gateway": cpu_s}, 1000) for turn, cpu_s in ((0, 0.05), (1, 0.07))]
    assert summarise(two)[0]["cpu_us_per_token"] == {"gateway": 60.0}
