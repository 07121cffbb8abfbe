"""The benchmarks' command: its verbs and options, and the measures of the code's shape."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import VERBS, arguments
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
