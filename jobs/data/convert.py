"""``python -m jobs.data convert IN OUT`` turns question/answer JSON lines (as GSM8K's) or ``sentence<TAB>label`` lines (as SST-2's) into chat
JSON lines."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import DataError
from cluster.jobspec import Parser
from jobs import sources
from jobs.data.lines import Problem, decode, lines

HEADER = b"sentence\tlabel"
"""SST-2's first line."""


def convert(source: str, labels: list[str]) -> Iterator[str]:
    """Chat JSON lines from question/answer JSON lines or ``sentence<TAB>label`` lines.

    With ``labels``, the label ``0`` becomes the first word and so on.
    """
    for number, line in lines(sources.local(source)):
        if line.rstrip() == HEADER:
            continue
        try:
            question, answer = pair(line)
        except Problem as problem:
            raise problem.at(source, number) from None
        if labels and answer.isdigit() and int(answer) < len(labels):
            answer = labels[int(answer)]
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": chat}, ensure_ascii=False)


def pair(line: bytes) -> tuple[str, str]:
    if not line.startswith(b"{"):
        sentence, tab, label = line.decode("utf-8", "replace").strip().rpartition("\t")
        if not tab:
            raise Problem("no tab", "Write sentence<TAB>label.")
        return sentence.strip(), label
    value = decode(line)
    if not (isinstance(value.get("question"), str) and isinstance(value.get("answer"), str)):
        raise Problem("no question and answer", 'Write {"question": "...", "answer": "..."}.')
    return value["question"], value["answer"]


def run() -> None:
    parser = Parser("jobs.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_subparsers(required=True).add_parser("convert", help="question/answer JSON lines or TSV → chat JSON lines")
    verb.add_argument("source", help="path or URL")
    verb.add_argument("target", type=Path)
    verb.add_argument("--labels", default="", help="words for the labels 0, 1, …: --labels negative,positive")
    arguments = parser.parse_args()
    made = list(convert(arguments.source, [word for word in arguments.labels.split(",") if word]))
    try:
        arguments.target.write_text("".join(f"{line}\n" for line in made), "utf-8")
    except OSError as error:
        raise DataError(
            f"{arguments.target} cannot be written: {error.strerror}.", "Choose a path in a folder that exists."
        ) from error
    print(f"{len(made)} examples in {arguments.target}")
