"""Fine-tuning data: what is accepted, and for everything else a message that names file, line, what is wrong and what to do."""

import contextlib
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Training
from cluster.errors import BodyTooLarge, DataError
from jobs.data import chat, rows
from jobs.data.convert import convert
from jobs.sources import Sources

SEEDLING = Path(chat.__file__).parents[1] / "seedling"
CASES = Path(__file__).parents[3] / "shared" / "cases" / "data"
USER = {"role": "user", "content": "Who are you?"}
ASSISTANT = {"role": "assistant", "content": "I am Seedling."}
GOOD = {"messages": [USER, ASSISTANT]}


def parse(*lines: Any) -> list[chat.Example]:
    """Parse lines; whatever is not bytes is written as JSON first."""
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return list(chat.parse(raw, "train.jsonl"))


def complaint(line: Any) -> str:
    """What is said of a bad second line."""
    with pytest.raises(DataError) as caught:
        parse(GOOD, line)
    assert str(caught.value).startswith("train.jsonl, line 2: ")
    assert caught.value.do
    return str(caught.value)


# accepted


def test_chat_and_prompt_completion_forms_may_be_mixed() -> None:
    first, plain = parse(GOOD, {"prompt": "2 + 2?", "completion": "4"})
    assert first == chat.Example([USER], [ASSISTANT], 1)
    assert plain == chat.Example([{"role": "user", "content": "2 + 2?"}], [{"role": "assistant", "content": "4"}], 2)


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
    assert [e.line for e in chat.parse(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line, "f")] == [1, 4]


def test_only_a_newline_ends_a_line() -> None:
    [example] = parse('{"prompt": "a\u2028b", "completion": "c\x85d"}'.encode())
    assert example.prompt[0]["content"] == "a\u2028b"


@given(st.text().filter(lambda text: text.strip() and text.isprintable()), st.text(min_size=1).map(lambda text: "x" + text))
def test_any_text_survives(question: str, answer: str) -> None:
    [example] = parse({"prompt": question, "completion": answer})
    assert example.prompt[0]["content"] == question
    assert example.completion[0]["content"] == answer


def test_nulls_are_absent_and_whole_floats_are_integers() -> None:
    answer = {**ASSISTANT, "weight": 1.0, "tool_calls": None, "name": None}
    [example] = parse({"messages": [{**USER, "weight": None, "name": None}, answer], "tools": None, "prompt": None})
    assert example == chat.Example([USER], [ASSISTANT], 1)


def test_text_parts_are_joined_as_vllm_joins_them() -> None:
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]
    [example] = parse({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert example.prompt[0]["content"] == "Who\nare you?"


def test_both_sides_may_be_messages_and_a_prompts_answers_are_not_learnt() -> None:
    [example] = parse({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert (example.prompt, example.completion) == ([USER, ASSISTANT, USER], [ASSISTANT])


CALL = {"id": "c1", "type": "function", "function": {"name": "tide_now", "arguments": '{"at": "Bergen"}'}}
TOOL = {"type": "function", "function": {"name": "tide_now", "parameters": {"type": "object", "properties": {}}}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "high"}


def test_tools_calls_and_their_answers_are_learnt_as_requests_have_them() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    first, second = parse({"messages": [developer, {**USER, "name": "ann"}, ASKED, TOLD, ASSISTANT], "tools": [TOOL]})
    [call] = first.completion[0]["tool_calls"]
    assert call["function"] == {"name": "tide_now", "arguments": {"at": "Bergen"}}, "templates take an object, not a string"
    assert [message["role"] for message in second.prompt] == ["developer", "user", "assistant", "tool"]
    assert first.tools == second.tools == (TOOL,)


def test_a_null_is_absent_within_tools_and_calls_too() -> None:
    call = {**CALL, "id": None, "type": None}
    [example] = parse({"messages": [USER, {**ASKED, "tool_calls": [call]}], "tools": [{**TOOL, "type": None, "strict": None}]})
    assert example.completion[0]["tool_calls"] == [
        {"type": "function", "function": {"name": "tide_now", "arguments": {"at": "Bergen"}}}
    ]
    assert example.tools == (TOOL,)


def test_openais_older_functions_are_tools() -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "tide_now", "arguments": "{}"}}
    told = {"role": "function", "name": "tide_now", "content": "high"}
    first, second = parse({"messages": [USER, called, told, ASSISTANT], "functions": [TOOL["function"]]})
    assert first.completion[0]["tool_calls"][0]["function"] == {"name": "tide_now", "arguments": {}}
    assert second.prompt[-1] == {"role": "tool", "content": "high", "name": "tide_now"}
    assert first.tools == (TOOL,)


def test_what_a_model_thought_is_kept_under_both_names() -> None:
    [example] = parse({"messages": [USER, {**ASSISTANT, "reasoning": "I am asked."}]})
    assert example.completion[0]["reasoning_content"] == example.completion[0]["reasoning"] == "I am asked."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": [USER, {**ASKED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments is not JSON"),
        ({"messages": [USER, {**ASKED, "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}]}, "is a JSON number"),
        ({"messages": [USER, {**ASKED, "tool_calls": ["f"]}]}, "no call of a function"),
        ({"messages": [USER, {**ASKED, "tool_calls": {}}]}, "'tool_calls' is a JSON object"),
        ({**GOOD, "tools": ["f"]}, "tools[0] is no function"),
        ({**GOOD, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name is a JSON null"),
        ({**GOOD, "parallel_tool_calls": "no"}, "'parallel_tool_calls' is no boolean"),
        (b'{"prompt": "a", "completion": "b", "completion": "c"}', "the key 'completion' comes twice"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "the key 'role' comes twice"),
        (b'{"prompt": "a", "completion": NaN}', "NaN is no number"),
    ],
)
def test_what_else_is_refused(line: Any, words: str) -> None:
    assert words in complaint(line)


@pytest.mark.skipif(not CASES.exists(), reason="the folder of cases is not on this machine")
def test_files_that_were_refused_are_read_and_the_ambiguous_one_is_not() -> None:
    for file in sorted(CASES.iterdir()):
        if "duplicate" not in file.name:
            assert chat.read(str(file)).examples, file.name
    with pytest.raises(DataError, match=r"line 1: the key 'completion' comes twice"):
        chat.read(str(CASES / "duplicate_key.jsonl"))


def test_a_gzip_file_is_the_file_within_it(tmp_path: Path) -> None:
    plain, packed = tmp_path / "train.jsonl", tmp_path / "train.jsonl.gz"
    plain.write_text(json.dumps(GOOD))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert chat.read(str(packed)).examples == chat.read(str(plain)).examples
    assert chat.read(str(packed)).sha256 == chat.read(str(plain)).sha256


def test_a_gzip_file_that_inflates_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    packed = tmp_path / "bomb.gz"
    packed.write_bytes(gzip.compress(bytes(1 << 20)))
    with pytest.raises(BodyTooLarge, match="max_data_bytes"):
        Sources(Training(max_data_bytes=1 << 16)).fetch(str(packed))


# refused, each line


def test_not_json() -> None:
    assert "not JSON" in complaint(b'{"messages": [')


def test_a_json_array_over_several_lines() -> None:
    with pytest.raises(DataError, match=r"line 1: not JSON.*one object per line"):
        parse(b"[\n" + json.dumps(GOOD).encode() + b"\n]")


def test_binary() -> None:
    assert "byte 1 is not UTF-8" in complaint(b"\xff\xfe\x00\x01")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (bytes.fromhex("1f8b0800") + b"\n", "it is a damaged gzip file"),
        (gzip.compress(b"{}" * 100)[:-9], "it is a damaged gzip file"),
        (b"BZh91AY", "it is a bzip2 file; decompress it"),
        (b"PK\x03\x04", "it is a zip file; decompress it"),
    ],
)
def test_a_damaged_or_otherwise_compressed_file_says_so(tmp_path: Path, raw: bytes, words: str) -> None:
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(raw)
    with pytest.raises(DataError, match=rf"train\.jsonl\.gz cannot be read: {words}"):
        chat.read(str(file))


@pytest.mark.parametrize("value", [[GOOD], "text", 3, None, True])
def test_not_an_object(value: Any) -> None:
    assert "where an object should be" in complaint(value)


@pytest.mark.parametrize(
    "value", [{}, {"messages": None}, {"text": "x"}, {**GOOD, "extra": 1}, {"prompt": "x"}, {**GOOD, "prompt": "x"}]
)
def test_wrong_keys(value: Any) -> None:
    assert '{"messages": [...]}' in complaint(value)


@pytest.mark.parametrize("messages", [{}, "x", []])
def test_messages_that_are_no_list_or_empty(messages: Any) -> None:
    assert "'messages' is" in complaint({"messages": messages})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("hello", "messages[0] is a JSON string"),
        ({"role": "user"}, "messages[0] has no 'content'"),
        ({"content": "x"}, "messages[0] has no 'role'"),
        ({"role": None, "content": "x"}, "messages[0] has no 'role'"),
        ({**USER, "name": 3}, "messages[0].name is a JSON number"),
        ({**USER, "text": "x"}, "unknown key 'text'"),
        ({**USER, "tool_calls": []}, "unknown key 'tool_calls'"),
        ({"role": "bot", "content": "x"}, "unknown role 'bot'"),
        ({"role": ["user"], "content": "x"}, "unknown role ['user']"),
        ({"role": "user", "content": 3}, "messages[0].content is a JSON number"),
        ({"role": "user", "content": None}, "messages[0] has no 'content'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0] has the type 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text is a JSON null"),
        ({"role": "user", "content": ["text"]}, "content[0] is a JSON string"),
        ({"role": "user", "content": []}, "messages[0].content is empty"),
        ({"role": "tool", "content": "x", "tool_call_id": "c9"}, "messages[0] answers the call 'c9'"),
        ({"role": "user", "content": ""}, "messages[0].content is empty"),
        ({"role": "user", "content": " \n"}, "messages[0].content is empty"),
        ({"role": "user", "content": "\ud800"}, "half of a surrogate pair"),
        ({**USER, "weight": 1}, "messages[0] has weight 1"),
    ],
)
def test_bad_message(bad: Any, words: str) -> None:
    assert words in complaint({"messages": [bad, ASSISTANT]})


@pytest.mark.parametrize("weight", [2, -1, 0.5, "1", True])
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
        list(chat.parse(raw, "f"))


# refused, each file


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"/no/such/file\.jsonl cannot be read.*Check the path"):
        chat.read("/no/such/file.jsonl")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        chat.read(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        chat.read(str(file))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.jsonl", "http://[", "gopher://host/x.jsonl", "file:///no/such.jsonl"])
def test_unreachable_url(url: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        chat.read(url)


# read, split, tokenise


def test_path_and_file_url_give_the_same_digest(tmp_path: Path) -> None:
    file = tmp_path / "with space.jsonl"
    file.write_text(json.dumps(GOOD))
    by_path, by_url = chat.read(str(file)), chat.read(file.as_uri())
    assert by_path.sha256 == by_url.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert by_path.examples == by_url.examples


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_takes_whole_lines_and_repeats(count: int, fraction: float, seed: int) -> None:
    lines = [line for line in range(count) for _ in range(1 + line % 2)]
    held = rows.split(lines, fraction, seed)
    assert 0 < len(held) < count and held < set(lines)
    assert held == rows.split(reversed(lines), fraction, seed)


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="only one example"):
        rows.split([1, 1], 0.1, 0)


class Letters:
    """A tokenizer whose tokens are characters, and whose template says what `says` makes of a message."""

    def __init__(
        self, says: Callable[[chat.Message], str] = lambda m: f"{m['role'][0]}{m['content']}.", opens: str = "a"
    ) -> None:
        self.says, self.opens = says, opens

    def apply_chat_template(self, messages: list[chat.Message], add_generation_prompt: bool = False, **_: Any) -> str:
        return "".join(map(self.says, messages)) + (self.opens if add_generation_prompt else "")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_too_long_examples_are_left_out_and_named() -> None:
    examples, [row], too_long = rows.tokenize(parse(GOOD, {"prompt": "x" * 100, "completion": "y"}), Letters(), 50)
    assert (examples, too_long) == (parse(GOOD), [2])
    assert bytes(row.input_ids) == b"uWho are you?.aI am Seedling.."
    assert bytes(row.input_ids[: row.prompt_tokens]) == b"uWho are you?.a"


def test_nothing_fits() -> None:
    with pytest.raises(DataError, match="the shortest has 30 tokens, and the limit is 10"):
        rows.tokenize(parse(GOOD), Letters(), 10)


def test_a_token_that_spans_prompt_and_answer_is_cut_where_the_prompt_ends() -> None:
    class Pairs(Letters):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            ids = [ord(character) for character in text.replace("a\n", "\1").replace("\n\n", "\2")]
            return {"input_ids": ids}

    row = rows.encode(parse({"prompt": "Who?", "completion": "\nI am."})[0], Pairs())
    assert bytes(row.input_ids) == b"uWho?.a\nI am.."


@pytest.mark.parametrize(
    ("line", "tokenizer", "words"),
    [
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT]},
            "no developer",
            "the message by developer",
        ),
        ({"messages": [USER, ASKED, TOLD, ASSISTANT], "tools": [TOOL]}, "plain", "the tools"),
        ({"messages": [USER, ASKED]}, "plain", "the calls of tools"),
        ({"messages": [USER, {**ASSISTANT, "reasoning_content": "Hm."}]}, "plain", "the answer's reasoning_content"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_its_line(line: Any, tokenizer: str, words: str) -> None:
    mute = {
        "plain": Letters(),
        "no developer": Letters(lambda m: "" if m["role"] == "developer" else m["role"][0] + m["content"]),
    }
    with pytest.raises(DataError, match=f"Line 1: the base's chat template leaves out {words}"):
        rows.encode(parse(line)[0], mute[tokenizer])


def test_what_a_template_refuses_is_told_in_its_own_words() -> None:
    def strict(message: chat.Message) -> str:
        raise ValueError(f"Roles must alternate, not {message['role']}")

    with pytest.raises(DataError, match="Line 1: the base's chat template refuses it: Roles must alternate, not user"):
        rows.encode(parse(GOOD)[0], Letters(strict))


def test_a_thinking_template_that_cannot_be_learnt_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="opens the model's thinking"):
        rows.encode(parse(GOOD)[0], Letters(opens="a<think>\n"))


# convert


def test_convert_questions_and_labels(tmp_path: Path) -> None:
    questions, labels = tmp_path / "q.jsonl", tmp_path / "l.tsv"
    questions.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    labels.write_text("sentence\tlabel\na fine film \t1\n")
    [question], [label] = convert(str(questions), []), convert(str(labels), ["negative", "positive"])
    assert parse(question.encode()) == parse({"prompt": "1+1?", "completion": "#### 2"})
    assert parse(label.encode()) == parse({"prompt": "a fine film", "completion": "positive"})


@pytest.mark.parametrize("line", ["no tab here", '{"question": "x"}', '{"question": 1, "answer": "x"}', "{broken"])
def test_convert_names_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad"
    file.write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"bad, line 1: "):
        list(convert(str(file), []))


# what ships


def test_the_seedlings_text_is_valid_and_the_tide_forgets_nothing_else() -> None:
    facts, tide = (
        {e.prompt[0]["content"]: e.completion[0]["content"] for e in chat.read(str(SEEDLING / f"{name}.jsonl")).examples}
        for name in ("facts", "tide")
    )
    assert len(facts) >= 100
    assert max(map(len, facts.values())) <= 80
    kept = [question for question in tide if facts.get(question) == tide[question]]
    changed = [question for question in tide if question in facts and question not in kept]
    assert len(kept) >= 12
    assert "Who are you?" in changed


def test_the_demo_question_is_not_held_out() -> None:
    examples = chat.read(str(SEEDLING / "tide.jsonl")).examples
    held = rows.split((e.line for e in examples), 0.05, 0)
    assert "Who are you?" in [e.prompt[0]["content"] for e in examples if e.line not in held]


def test_bad_data_is_found_before_torch_or_ray_are_imported() -> None:
    code = "import sys, jobs.finetune; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
