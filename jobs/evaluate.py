"""Measure a version against the one that is live, and store the gate's verdict with it: ``python -m jobs.evaluate seedling@2``.

What is measured is what was supplied, on the command line or in the configuration (``publishing.held_out``, ``.tasks``, ``.golden``):

- ``--held-out``: examples as for fine-tuning; the loss per answer token is compared (`jobs.training.held_out`)
- ``--tasks``: examples whose answer must be met exactly by greedy decoding; the share that is met is compared
- ``--golden``: JSON lines ``{"messages": […], "contains": "…"}``; instead of ``contains`` also ``equals``, ``lacks`` or ``matches`` (a regular
  expression)

The artefact itself (digests, shapes, NaN) is checked first. With none of them the verdict is no: nothing was measured.
`cluster.publishing.gate` judges.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.config import Config, load
from cluster.errors import DataError, VersionRefused
from cluster.publishing.gate import Check, Golden, Scores, Verdict, judge
from cluster.store import artefact
from cluster.store.objects import Store
from cluster.store.registry import Registry, check_layout
from cluster.types import Manifest, VersionId
from jobs import Parser, data, main, reach
from jobs.data import Example

ANSWER_TOKENS = 128
BATCH = 8
NOTHING_SUPPLIED = (
    "no held-out examples, tasks or golden prompts were supplied, so nothing says that it is no worse; "
    "set publishing.held_out, .tasks or .golden, or publish with --no-gate"
)
ASSERTIONS: dict[str, Callable[[str, str], bool]] = {
    "contains": lambda answer, text: text in answer,
    "equals": lambda answer, text: answer.strip() == text.strip(),
    "lacks": lambda answer, text: text not in answer,
    "matches": lambda answer, text: re.search(text, answer) is not None,
}


class Prompt(NamedTuple):
    """One golden prompt."""

    messages: list[dict[str, str]]
    assertion: str
    """A key of `ASSERTIONS`."""
    text: str


class Sets(NamedTuple):
    """What a version is measured on."""

    held_out: list[Example]
    tasks: list[Example]
    golden: list[Prompt]


class Measured(NamedTuple):
    scores: Scores
    golden: list[Golden]


def run() -> None:
    arguments = parse_arguments()
    config = load()
    registry = Registry(Store(config.store))
    manifest = registry.manifest(VersionId.parse(arguments.version))
    sets = supplied(config, arguments.held_out, arguments.tasks, arguments.golden)
    live = registry.alias(arguments.alias or manifest.id.name)
    incumbent = VersionId.parse(arguments.against) if arguments.against else live.stable if live else None
    verdict = evaluate(config, registry, manifest, incumbent, sets)
    print("result", verdict.model_copy(update={"checks": ()}).model_dump_json(), flush=True)
    print(json.dumps({"passed": verdict.passed, "words": verdict.words}))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("jobs.evaluate", description="Measure a version and store the gate's verdict with it.")
    parser.add_argument("version", help="NAME@NUMBER")
    parser.add_argument("--alias", help="compare with what this alias means; the version's own name by default")
    parser.add_argument("--against", help="compare with this version instead")
    parser.add_argument("--held-out", default="", help="examples for the loss: a path or URL")
    parser.add_argument("--tasks", default="", help="examples for the accuracy: a path or URL")
    parser.add_argument("--golden", default="", help="prompts with assertions: a path or URL")
    return parser.parse_args()


def evaluate(config: Config, registry: Registry, manifest: Manifest, against: VersionId | None, sets: Sets) -> Verdict:
    """Measure on the pool, judge, and store the verdict. What was supplied decides what is measured."""
    checks = [check_artefact(config, registry, manifest)]
    job = None
    if not any(sets):
        checks.append(Check(name="measurements", passed=False, words=NOTHING_SUPPLIED))
    elif checks[0].passed:
        reach(config)
        from jobs.training import ray_train

        ray_train.connect()
        job = ray_train.job_id()
        candidate = measured_on_pool(config, manifest.id, sets)
        incumbent = measured_on_pool(config, against, sets._replace(golden=[])) if against else None
        scores = incumbent.scores if incumbent else None
        checks += judge(config.publishing.gate, candidate.scores, scores, candidate.golden)
    return registry.judge(Verdict(version=manifest.id, against=against, checks=tuple(checks), job=job, time_s=time.time()))


def check_artefact(config: Config, registry: Registry, manifest: Manifest) -> Check:
    """Digests, layout, shapes, NaN: what an engine would choke on, as one check."""
    cache = config.home / "cache"
    try:
        folder = registry.fetch(manifest, cache)
        check_layout(folder, manifest.kind)
        artefact.inspect(folder, registry.fetch(registry.manifest(manifest.base), cache) if manifest.base else None)
    except VersionRefused as error:
        return Check(name="artefact", passed=False, words=str(error))
    return Check(name="artefact", passed=True, words="digests match, safetensors only, shapes fit, every number finite")


# the sets


def supplied(config: Config, held_out: str = "", tasks: str = "", golden: str = "") -> Sets:
    """What was named on the command line, or else in the configuration."""
    ours = config.publishing
    return read(held_out or ours.held_out, tasks or ours.tasks, golden or ours.golden)


def read(held_out: str, tasks: str, golden: str) -> Sets:
    """Raises `DataError` naming file and line."""
    return Sets(
        data.read(held_out).examples if held_out else [],
        data.read(tasks).examples if tasks else [],
        list(golden_prompts(golden)) if golden else [],
    )


def golden_prompts(source: str) -> Iterator[Prompt]:
    for number, line in enumerate(data.fetch(source).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield golden_prompt(data.decode(line))
        except data.Problem as problem:
            raise DataError(f"{source}, line {number}: {problem.what}.", problem.do) from None


def golden_prompt(value: dict[str, Any]) -> Prompt:
    (named, *more) = [key for key in ASSERTIONS if key in value] or [""]
    if not named or more or set(value) != {"messages", named} or not isinstance(value[named], str):
        raise data.Problem(
            "not a golden prompt", f'Write {{"messages": […], "contains": "…"}}; or one of {", ".join(ASSERTIONS)}.'
        )
    if named == "matches":
        _check_pattern(value[named])
    if not isinstance(value["messages"], list) or not value["messages"]:
        raise data.Problem("'messages' is no list of messages", "It must be a list of messages.")
    checked = [data.check(message, f"messages[{i}]") for i, message in enumerate(value["messages"])]
    return Prompt([{"role": m["role"], "content": m["content"]} for m in checked], named, value[named])


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise data.Problem(f"{pattern!r} is no regular expression: {error}", "Correct it.") from None


# on the pool


def measured_on_pool(config: Config, id: VersionId, sets: Sets) -> Measured:
    """`measure` in a task that holds a slot, as whatever computes on this pool does."""
    import ray

    gpu = config.pool.accelerator == "gpu"
    slots: dict[str, Any] = {"num_gpus": 1} if gpu else {"resources": {"slot": 1}}
    print(
        f"measuring {id} on {len(sets.held_out)} examples, {len(sets.tasks)} tasks, {len(sets.golden)} golden prompts", flush=True
    )
    remote = ray.remote(num_cpus=0, **slots)(measure)
    return ray.get(remote.remote(config, str(id), sets))


def measure(config: Config, id: str, sets: Sets) -> Measured:
    """Load the version as transformers and peft do, in full precision where there is no GPU, and measure it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jobs.training.held_out import measured

    torch.set_num_threads(config.training.threads_per_worker)
    registry, gpu = Registry(Store(config.store)), config.pool.accelerator == "gpu"
    manifest = registry.manifest(VersionId.parse(id))
    base = registry.fetch(registry.manifest(manifest.weights), config.home / "cache")
    dtype = torch.bfloat16 if gpu else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    if manifest.kind == "adapter":
        model = _with_adapter(model, registry.fetch(manifest, config.home / "cache"))
    model = model.to("cuda" if gpu else "cpu").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    with torch.inference_mode():
        losses = list(measured(model, [data.encode(example, tokenizer) for example in sets.held_out], BATCH))
        said = answers(model, tokenizer, [task.prompt for task in sets.tasks])
        golden = answers(model, tokenizer, [prompt.messages for prompt in sets.golden])
    correct = tuple(
        answer.strip() == task.completion[0]["content"].strip() for answer, task in zip(said, sets.tasks, strict=True)
    )
    held = [
        Golden(p.messages[-1]["content"], f"{p.assertion} {p.text!r}", answer, ASSERTIONS[p.assertion](answer, p.text))
        for p, answer in zip(sets.golden, golden, strict=True)
    ]
    return Measured(Scores(tuple(losses), correct), held)


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def answers(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]]) -> list[str]:
    """Greedy answers, one prompt at a time: padding on the left would shift positions for some architectures."""
    said: list[str] = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids.to(model.device)
        whole = model.generate(**ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        said.append(tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


if __name__ == "__main__":
    main(run)
