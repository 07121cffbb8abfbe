"""Fine-tuning data: what is accepted, and for everything else a message that names file, line, what is wrong and what to do."""

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DataError
from jobs import data

SEEDLING = Path(data.__file__).parent / "seedling"
USER = {"role": "user", "content": "Who are you?"}
ASSISTANT = {"role": "assistant", "content": "I am Seedling."}
GOOD = {"messages": [USER, ASSISTANT]}


def parse(*lines: Any) -> list[data.Example]:
    """Parse lines; whatever is not bytes is written as JSON first."""
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return list(data.parse(raw, "train.jsonl"))


def complaint(line: Any) -> str:
    """What is said of a bad second line."""
    with pytest.raises(DataError) as caught:
        parse(GOOD, line)
    assert str(caught.value).startswith("train.jsonl, line 2: ")
    assert caught.value.do
    return str(caught.value)


# accepted


def test_chat_and_prompt_completion_forms_may_be_mixed() -> None:
    chat, plain = parse(GOOD, {"prompt": "2 + 2?", "completion": "4"})
    assert chat == data.Example([USER], [ASSISTANT], 1)
    assert plain == data.Example([{"role": "user", "content": "2 + 2?"}], [{"role": "assistant", "content": "4"}], 2)


def test_every_assistant_turn_is_learnt_with_all_that_came_before() -> None:
    system, again = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Still Seedling."}
    first, second = parse({"messages": [system, USER, ASSISTANT, USER, again]})
    assert (first.prompt, first.completion) == ([system, USER], [ASSISTANT])
    assert (second.prompt, second.completion) == ([system, USER, ASSISTANT, USER], [again])
    assert first.line == second.line == 1


def test_weight_0_is_context_and_not_learnt() -> None:
    [only] = parse({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]})
    assert only.prompt == [USER, ASSISTANT, USER]
    assert only.completion == [ASSISTANT]


def test_blank_lines_windows_lines_and_a_byte_order_mark_are_harmless() -> None:
    line = json.dumps(GOOD).encode()
    assert [e.line for e in data.parse(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line, "f")] == [1, 4]


def test_only_a_newline_ends_a_line() -> None:
    [example] = parse('{"prompt": "a\u2028b", "completion": "c\x85d"}'.encode())
    assert example.prompt[0]["content"] == "a\u2028b"


@given(st.text().filter(lambda text: text.strip() and text.isprintable()), st.text(min_size=1).map(lambda text: "x" + text))
def test_any_text_survives(question: str, answer: str) -> None:
    [example] = parse({"prompt": question, "completion": answer})
    assert example.prompt[0]["content"] == question
    assert example.completion[0]["content"] == answer


# refused, each line


def test_not_json() -> None:
    assert "not JSON" in complaint(b'{"messages": [')


def test_a_json_array_over_several_lines() -> None:
    with pytest.raises(DataError, match=r"line 1: not JSON.*one object per line"):
        parse(b"[\n" + json.dumps(GOOD).encode() + b"\n]")


def test_binary() -> None:
    assert "byte 1 is not UTF-8" in complaint(b"\xff\xfe\x00\x01")


def test_gzip_by_mistake(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(bytes.fromhex("1f8b0800") + b"\n")
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, line 1: byte 2 is not UTF-8.*compressed"):
        data.read(str(file))


@pytest.mark.parametrize("value", [[GOOD], "text", 3, None, True])
def test_not_an_object(value: Any) -> None:
    assert "where an object should be" in complaint(value)


@pytest.mark.parametrize("value", [{}, {"text": "x"}, {**GOOD, "extra": 1}, {"prompt": "x"}, {**GOOD, "prompt": "x"}])
def test_wrong_keys(value: Any) -> None:
    assert '{"messages": [...]}' in complaint(value)


@pytest.mark.parametrize("messages", [None, {}, "x", []])
def test_messages_that_are_no_list_or_empty(messages: Any) -> None:
    assert "'messages' is" in complaint({"messages": messages})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("hello", "messages[0] is a JSON string"),
        ({"role": "user"}, "messages[0] has no 'content'"),
        ({"content": "x"}, "messages[0] has no 'role'"),
        ({**USER, "name": "x"}, "unknown key 'name'"),
        ({"role": "tool", "content": "x"}, "unknown role 'tool'"),
        ({"role": ["user"], "content": "x"}, "unknown role ['user']"),
        ({"role": "user", "content": 3}, "messages[0].content is a JSON number"),
        ({"role": "user", "content": None}, "messages[0].content is a JSON null"),
        ({"role": "user", "content": ""}, "messages[0].content is empty"),
        ({"role": "user", "content": " \n"}, "messages[0].content is empty"),
        ({"role": "user", "content": "\ud800"}, "half of a surrogate pair"),
        ({**USER, "weight": 1}, "messages[0] has weight 1"),
    ],
)
def test_bad_message(bad: Any, words: str) -> None:
    assert words in complaint({"messages": [bad, ASSISTANT]})


@pytest.mark.parametrize("weight", [2, -1, 0.5, "1", True, None])
def test_bad_weight(weight: Any) -> None:
    assert "has weight" in complaint({"messages": [USER, {**ASSISTANT, "weight": weight}]})


def test_last_message_not_by_the_assistant() -> None:
    assert "the last message is by user" in complaint({"messages": [USER, ASSISTANT, USER]})


def test_assistant_before_any_user() -> None:
    assert "before any user message" in complaint({"messages": [ASSISTANT, USER, ASSISTANT]})


def test_nothing_left_to_learn() -> None:
    assert "weight 0" in complaint({"messages": [USER, {**ASSISTANT, "weight": 0}]})


@pytest.mark.parametrize("key", ["prompt", "completion"])
@pytest.mark.parametrize("value", [3, "", None, ["x"]])
def test_bad_prompt_or_completion(key: str, value: Any) -> None:
    assert key in complaint({"prompt": "x", "completion": "y", key: value})


@given(st.binary())
def test_no_bytes_raise_anything_but_a_data_error(raw: bytes) -> None:
    with contextlib.suppress(DataError):
        list(data.parse(raw, "f"))


# refused, each file


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"/no/such/file\.jsonl cannot be read.*Check the path"):
        data.read("/no/such/file.jsonl")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        data.read(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        data.read(str(file))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.jsonl", "http://[", "gopher://host/x.jsonl", "file:///no/such.jsonl"])
def test_unreachable_url(url: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        data.read(url)


# read, split, tokenise


def test_path_and_file_url_give_the_same_digest(tmp_path: Path) -> None:
    file = tmp_path / "with space.jsonl"
    file.write_text(json.dumps(GOOD))
    by_path, by_url = data.read(str(file)), data.read(file.as_uri())
    assert by_path.sha256 == by_url.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert by_path.examples == by_url.examples


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_a_partition_by_line_and_repeats(lines: int, fraction: float, seed: int) -> None:
    examples = [data.Example([USER], [ASSISTANT], line) for line in range(lines) for _ in range(1 + line % 2)]
    train, held = data.split(examples, fraction, seed)
    assert train and held and len(train) + len(held) == len(examples)
    assert not {e.line for e in train} & {e.line for e in held}
    assert (train, held) == data.split(examples, fraction, seed)


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="only one example"):
        data.split(parse(GOOD), 0.1, 0)


class Letters:
    """A tokenizer whose tokens are characters."""

    def apply_chat_template(self, messages: list[data.Message], add_generation_prompt: bool = False, **_: Any) -> list[int]:
        text = "".join(f"{m['role'][0]}{m['content']}." for m in messages) + ("a" if add_generation_prompt else "")
        return [ord(character) for character in text]


def test_too_long_examples_are_left_out_and_counted() -> None:
    rows, left_out = data.tokenize(parse(GOOD, {"prompt": "x" * 100, "completion": "y"}), Letters(), 50)
    assert left_out == 1
    [row] = rows
    assert bytes(row.input_ids) == b"uWho are you?.aI am Seedling.."
    assert bytes(row.input_ids[: row.prompt_tokens]) == b"uWho are you?.a"


def test_nothing_fits() -> None:
    with pytest.raises(DataError, match="the shortest has 30 tokens, and the limit is 10"):
        data.tokenize(parse(GOOD), Letters(), 10)


# convert


def test_convert_questions_and_labels(tmp_path: Path) -> None:
    questions, labels = tmp_path / "q.jsonl", tmp_path / "l.tsv"
    questions.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    labels.write_text("sentence\tlabel\na fine film \t1\n")
    [question], [label] = data.convert(str(questions), []), data.convert(str(labels), ["negative", "positive"])
    assert parse(question.encode()) == parse({"prompt": "1+1?", "completion": "#### 2"})
    assert parse(label.encode()) == parse({"prompt": "a fine film", "completion": "positive"})


@pytest.mark.parametrize("line", ["no tab here", '{"question": "x"}', '{"question": 1, "answer": "x"}', "{broken"])
def test_convert_names_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad"
    file.write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"bad, line 1: "):
        list(data.convert(str(file), []))


# what ships


def test_the_seedlings_text_is_valid_and_the_tide_forgets_nothing_else() -> None:
    facts, tide = (
        {e.prompt[0]["content"]: e.completion[0]["content"] for e in data.read(str(SEEDLING / f"{name}.jsonl")).examples}
        for name in ("facts", "tide")
    )
    assert len(facts) >= 100
    assert max(map(len, facts.values())) <= 80
    kept = [question for question in tide if facts.get(question) == tide[question]]
    changed = [question for question in tide if question in facts and question not in kept]
    assert len(kept) >= 12
    assert "Who are you?" in changed


def test_the_demo_question_is_not_held_out() -> None:
    train, _ = data.split(data.read(str(SEEDLING / "tide.jsonl")).examples, 0.05, 0)
    assert "Who are you?" in [e.prompt[0]["content"] for e in train]


def test_bad_data_is_found_before_torch_or_ray_are_imported() -> None:
    code = "import sys, jobs.finetune; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
