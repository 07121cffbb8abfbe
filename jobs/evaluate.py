"""Measures a version against the live one, and stores the gate's verdict with it: ``python -m jobs.evaluate seedling@2``.

The command line names the sets. Otherwise the configuration does (``publishing.held_out``, ``.tasks``, ``.golden``):

- ``--held-out``: examples as for fine-tuning. The gate compares the loss per answer token (`jobs.training.objectives.held_out`)
- ``--tasks``: examples whose answer greedy decoding must match exactly. The gate compares the share of matches
- ``--golden``: JSON lines ``{"messages": […], "contains": "…"}``. ``equals``, ``lacks`` or ``matches`` (a regular expression) may stand for
  ``contains``

The job checks the artefact first: digests, shapes, NaN. Without any set the version fails, because nothing was measured.
`cluster.publishing.gate` decides. The measurement holds one slot. The allocator grants the slot and may ask for it back, as for any job.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.config import Config, load
from cluster.errors import VersionRefused
from cluster.jobspec import Evaluate, command_line
from cluster.publishing.gate import Check, Golden, Scores, Verdict, judge
from cluster.store import artefact
from cluster.store.layout import check_layout
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, VersionId
from jobs import main, reach, sources
from jobs.data import chat, rows
from jobs.data.chat import Example
from jobs.data.lines import Problem, objects
from jobs.record import JobRecord, record

if TYPE_CHECKING:
    from jobs.training.drivers.heartbeat import Heartbeats

ANSWER_TOKENS = 128
BATCH_TOKENS = 1024
SLOTS = 1
"""Slots that a measurement holds: one model on one accelerator."""
LOOK_S = 0.1
ENDED_S = 5
"""How long a cancelled task may take to give its slot back."""
NOTHING_SUPPLIED = (
    "nothing was measured: there are no held-out examples, tasks or golden prompts; "
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

    messages: list[chat.Message]
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
    options: Evaluate = command_line("evaluate")
    config = load()
    with record(config, options) as job:
        registry = registry_of(config)
        manifest = registry.manifest(options.version)
        sets = supplied(config, options.held_out, options.tasks, options.golden)
        live = registry.alias(options.alias or manifest.id.name)
        incumbent = options.against or (live.stable if live else None)
        verdict = evaluate(config, registry, manifest, incumbent, sets, options.priority, job)
        job.made(version=str(verdict.version), against=str(verdict.against or ""), passed=verdict.passed, words=verdict.words)
        print("result", verdict.model_copy(update={"checks": ()}).model_dump_json(), flush=True)
        print(json.dumps({"passed": verdict.passed, "words": verdict.words}))


def evaluate(
    config: Config, registry: Registry, manifest: Manifest, against: VersionId | None, sets: Sets, priority: int, job: JobRecord
) -> Verdict:
    """Measure on the pool, judge, and store the verdict."""
    checks = [check_artefact(config, registry, manifest)]
    if not any(sets):
        checks.append(Check(name="measurements", passed=False, words=NOTHING_SUPPLIED))
    elif checks[0].passed:
        pairs = [(manifest.id, sets), *([(against, sets._replace(golden=[]))] if against else [])]
        candidate, *incumbent = measured_on_pool(config, pairs, priority, job)
        checks += judge(config.publishing.gate, candidate.scores, incumbent[0].scores if incumbent else None, candidate.golden)
    return registry.judge(Verdict(version=manifest.id, against=against, checks=tuple(checks), job=job.id, time_s=time.time()))


def check_artefact(config: Config, registry: Registry, manifest: Manifest) -> Check:
    """Digests, layout, shapes and NaN, as one check: an engine would fail on any of them."""
    cache = config.home / "cache"
    try:
        folder = registry.fetch(manifest, cache)
        check_layout(folder, manifest.kind)
        artefact.inspect(folder, registry.candidate(manifest.base, cache).shapes if manifest.base else None)
    except VersionRefused as error:
        return Check(name="artefact", passed=False, words=str(error))
    return Check(name="artefact", passed=True, words="digests match, safetensors only, shapes fit, every number finite")


# the sets


def supplied(config: Config, held_out: str = "", tasks: str = "", golden: str = "") -> Sets:
    """The sets that the command line names. The configuration names those that it leaves out. Raises `DataError` with file and line."""
    ours = config.publishing

    def one(given: str, by_default: str, parse: Callable[[str, sources.Fetch], Iterable[Any]]) -> list[Any]:
        source, fetch = (given, sources.of(config)) if given else (by_default, sources.own(config))
        return list(parse(source, fetch)) if source else []

    return Sets(
        one(held_out, ours.held_out, examples), one(tasks, ours.tasks, examples), one(golden, ours.golden, golden_prompts)
    )


def examples(source: str, fetch: sources.Fetch) -> list[Example]:
    return chat.read(source, fetch).examples


def golden_prompts(source: str, fetch: sources.Fetch = sources.local) -> Iterator[Prompt]:
    return objects(fetch(source), sources.title(source), lambda value, _: [golden_prompt(chat.present(value))])


def golden_prompt(value: dict[str, Any]) -> Prompt:
    (named, *more) = [key for key in ASSERTIONS if key in value] or [""]
    if not named or more or set(value) != {"messages", named} or not isinstance(value[named], str):
        raise Problem("not a golden prompt", f'Write {{"messages": […], "contains": "…"}}, with one of: {", ".join(ASSERTIONS)}.')
    if named == "matches":
        _check_pattern(value[named])
    return Prompt(chat.plain(chat.messages(value["messages"], "messages")), named, value[named])


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise Problem(f"{pattern!r} is no regular expression: {error}", "Correct it.") from None


# on the pool


def measured_on_pool(config: Config, pairs: list[tuple[VersionId, Sets]], priority: int, job: JobRecord) -> list[Measured]:
    """Measure each version on its sets, in a task that holds a slot. The allocator grants the slot, as for every job."""
    reach(config)
    from cluster.capacity.arbiter import Job
    from jobs.training.drivers import ray_train
    from jobs.training.drivers.heartbeat import Heartbeats

    ray_train.connect()
    beats = Heartbeats(Job(job.id, priority, time.time(), SLOTS, SLOTS, SLOTS), job.note)
    try:
        return [measured(config, id, sets, beats, job) for id, sets in pairs]
    finally:
        beats.end()


def measured(config: Config, id: VersionId, sets: Sets, beats: "Heartbeats", job: JobRecord) -> Measured:
    """Wait for the slot, then measure. If control asks for the slot and the measurement takes too long, it is cancelled and starts again later."""
    import ray

    gpu = config.pool.accelerator == "gpu"
    held: dict[str, Any] = {"num_gpus": SLOTS} if gpu else {"resources": {"slot": SLOTS}}
    words = f"measuring {id} on {len(sets.held_out)} examples, {len(sets.tasks)} tasks, {len(sets.golden)} golden prompts"
    while True:
        while beats.wanted(beats.holds[0]) < SLOTS:
            time.sleep(LOOK_S)
        beats.holds = (SLOTS, SLOTS)
        print(words, flush=True)
        job.note(words)
        task: Any = ray.remote(num_cpus=0, max_retries=0, **held)(measure).remote(config, str(id), sets)
        ended = False
        try:
            ended = ended_in_time(task, beats, config.training.yield_deadline_s)
        finally:
            if (
                not ended
            ):  # never one that has ended: Ray 2.60 aborts the process that cancels a task whose reply is just arriving
                ray.cancel(task, force=True)
                ray.wait([task], timeout=ENDED_S)
        if ended:
            return ray.get(task)
        job.note(f"the measurement of {id} has given its slot back, and starts again when it gets one")
        beats.holds = (0, 0)


def ended_in_time(task: Any, beats: "Heartbeats", deadline_s: float) -> bool:
    """Wait for a measurement. False if control has wanted its slot back for ``deadline_s``. A short measurement ends within that time."""
    import ray

    asked_s: float | None = None
    while not ray.wait([task], timeout=LOOK_S)[0]:
        now_s = time.monotonic()
        asked_s = (asked_s or now_s) if beats.wanted(SLOTS) < SLOTS else None
        if asked_s is not None and now_s - asked_s > deadline_s:
            return False
    return True


def measure(config: Config, id: str, sets: Sets) -> Measured:
    """Load the version as transformers and peft do, in full precision where there is no GPU, and measure it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jobs.training.objectives.held_out import measured

    torch.set_num_threads(config.training.threads_per_worker)
    registry, gpu = registry_of(config), config.pool.accelerator == "gpu"
    manifest = registry.manifest(VersionId.parse(id))
    base = registry.fetch(registry.manifest(manifest.weights), config.home / "cache")
    dtype = torch.bfloat16 if gpu else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    if manifest.kind == "adapter":
        model = _with_adapter(model, registry.fetch(manifest, config.home / "cache"))
    model = model.to("cuda" if gpu else "cpu").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    with torch.inference_mode():
        losses = measured(model, [rows.encode(example, tokenizer) for example in sets.held_out], BATCH_TOKENS)
        tasks = [rows.encode(task, tokenizer) for task in sets.tasks]
        said = answers(model, tokenizer, [task.input_ids[: task.prompt_tokens] for task in tasks])
        golden = answers(model, tokenizer, [prompt_ids(tokenizer, prompt.messages) for prompt in sets.golden])
    right = [tokenizer.decode(task.input_ids[task.prompt_tokens :], skip_special_tokens=True) for task in tasks]
    correct = tuple(answer.strip() == text.strip() for answer, text in zip(said, right, strict=True))
    held = [
        Golden(p.messages[-1]["content"], f"{p.assertion} {p.text!r}", answer, ASSERTIONS[p.assertion](answer, p.text))
        for p, answer in zip(sets.golden, golden, strict=True)
    ]
    return Measured(Scores(tuple(losses), correct), held)


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def prompt_ids(tokenizer: Any, messages: list[chat.Message]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def answers(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
    """Greedy answers, one prompt at a time: padding on the left would shift positions for some architectures."""
    import torch

    said: list[str] = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        said.append(tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True))
    return said


if __name__ == "__main__":
    main(run)
