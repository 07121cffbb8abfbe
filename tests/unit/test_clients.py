"""The runner of `make test-clients`: what its scripts say, what it makes of it, and when an environment is made anew."""

from pathlib import Path

import pytest

from tests.clients import __main__ as runner
from tests.clients import environments
from tests.clients.__main__ import CLIENTS, Result, closing, main, said
from tests.clients.environments import NotInstalled

LAST = '{"version": "1.2", "passed": 3, "failed": 1}'


def test_a_scripts_last_line_counts_and_one_without_it_has_failed() -> None:
    assert said("x", f"ok a\nFAIL b\n{LAST}\n") == Result("x", "1.2", 3, 1)
    for output in ("", "Traceback: …", f"{LAST}\nIt did not end within 240 s.", '["passed"]'):
        assert said("x", output).failed == 1


def test_a_skipped_client_is_counted_as_such_and_hides_no_failure() -> None:
    assert (
        closing([Result("x", "1.2", 3, 1), Result("y", words="no wheel"), Result("z", failed=1)])
        == "3 passed, 2 failed, 1 skipped"
    )


def test_a_run_in_which_every_client_was_skipped_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [Result("x", words="no wheel"), Result("y", words="no node")]
    monkeypatch.setattr(runner, "checked", lambda clients: iter(results))  # pyright: ignore[reportUnknownLambdaType]
    assert main([]) == 1 and "2 skipped: no client was tried" in capsys.readouterr().out
    results.append(Result("z", "1.2", passed=1))
    assert main([]) == 0


def test_every_client_has_its_script_and_its_lock() -> None:
    scripts = {path.stem.removesuffix("_client") for path in (environments.HERE / "python").glob("*_client.py")}
    locks = {path.stem for path in environments.LOCKS.glob("*.txt")}
    assert scripts - {"vllm_bench"} == locks and scripts | {"openai-node"} == set(CLIENTS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environments, "LOCKS", tmp_path)
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path / "made")
    return tmp_path


def test_an_environment_is_made_once_for_each_lock(place: Path) -> None:
    (place / "nothing.txt").write_text("# one")
    for lock in ("# one", "# another"):
        (place / "nothing.txt").write_text(lock)
        interpreter, script = environments.python("nothing")
        (Path(interpreter).parent / "mark").touch()
        assert environments.python("nothing") == [interpreter, script] and (Path(interpreter).parent / "mark").exists()
        assert (place / "made" / "nothing" / "nothing.txt").read_text() == lock
    assert script.endswith("tests/clients/python/nothing_client.py")


def test_what_the_index_lacks_is_said_and_tried_again(place: Path) -> None:
    (place / "wrong.txt").write_text("this is no requirement")
    with pytest.raises(NotInstalled, match=r"(?i)invalid requirement"):
        environments.python("wrong")
    assert not (place / "made" / "wrong" / "wrong.txt").exists()
