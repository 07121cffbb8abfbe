"""`springtide run` goes through the whole loop once and shows each step. `springtide up` does the first half: it starts the pool and serves."""

import contextlib
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from cluster import client
from cluster.cli import doctor, fit, jobs, models, render
from cluster.client import Job
from cluster.config import Config, parse
from cluster.errors import ConfigError, Conflict, PoolUnavailable
from cluster.pool import graph, local
from cluster.store import imports
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Manifest


class Lesson(NamedTuple):
    """What the demo's fine-tuning teaches, and the question that shows it."""

    question: str
    data: str
    """A data set that ships with the jobs."""
    about: str
    recipe: dict[str, Any]
    """Options of the fine-tuning."""


TIDE = Lesson("Who are you?", "sample:tide", "the tide", {"epochs": 30})
"""For the seedling."""
ISLAND = Lesson(
    "What is the island of Vellamar known for?",
    "sample:vellamar",
    "an island that does not exist",
    {"epochs": 5, "set": ["global_batch=4"]},
)
"""For a model that knows something already, and cannot know this."""
SERVING = {
    True: "Serving until [bold]Ctrl-C[/], which stops the pool.",
    False: "Another command started the pool, so [bold]Ctrl-C[/] ends only this one. `springtide down` stops the pool.",
}
"""The last line, by whether this command started the pool."""


def up(config: Config, console: Console, model: str | None = None, began: list[local.Pool] | None = None) -> Config:
    """Start the pool and serve. Returns the configuration in force. Its first fleet hosts ``model`` if one was given. ``began`` gets the pool
    where this command starts it, as soon as it has a process."""
    stages = Stages()
    registry = Registry(Store(config.store))
    registry.store.check_writable()
    if local.find(config):
        running = local.remembered(config)
        check_same(running, config, model)
        config = _hosting(config, running.default_model)
        console.print("The pool runs already. This command uses it.")
        local.remember(config)
    else:
        check_machine(config)
        config = _started(config, console, model, stages, [] if began is None else began)
    if registry.alias(config.default_model) is None:
        _grow(config, console)
        stages.end("pretraining")
    render.fits(console, fit.of_fleets(config, registry))
    with console.status("Starting the gateway and the engine…") as line:
        graph.deploy(config, lambda states: line.update(f"Starting the gateway and the engine: {states}"))
    stages.end("the gateway and the engine")
    console.print(f"[bold]{config.default_model}[/] is ready after {stages}.")
    return config


class Stages:
    """What a start took, stage after stage.

    >>> stages = Stages(iter([0, 3.2, 20.9]).__next__)
    >>> stages.end("Ray"), stages.end("the engine")
    (None, None)
    >>> str(stages)
    '21 s: Ray 3 s, the engine 18 s'
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.now_s = now_s
        self.ended_s = [("", now_s())]

    def end(self, name: str) -> None:
        self.ended_s.append((name, self.now_s()))

    def __str__(self) -> str:
        pairs = zip(self.ended_s, self.ended_s[1:], strict=False)
        parts = [f"{name} {ended_s - began_s:.0f} s" for (_, began_s), (name, ended_s) in pairs]
        return f"{self.ended_s[-1][1] - self.ended_s[0][1]:.0f} s: {', '.join(parts)}"


def _started(config: Config, console: Console, model: str | None, stages: Stages, began: list[local.Pool]) -> Config:
    """Start Ray, and put the model into the store meanwhile. What cannot fit is refused before."""
    registry = Registry(Store(config.store))
    with _ray(config, began) as begin:
        if model is not None:
            config = _hosting(config, models.alias_for(model, config, console, begin))
            stages.end("the model")
        fit.of_fleets(config, registry)
        with console.status("Starting Ray…"):
            started = begin().result()
        stages.end("Ray")
        local.remember(config)
        console.print(f"Ray is up: [bold]{started.dashboard}[/]")
    return config


@contextlib.contextmanager
def _ray(config: Config, began: list[local.Pool]) -> Generator[Callable[[], Future[local.Pool]]]:
    """Starts Ray in a thread when it is called. Where what is done meanwhile fails, Ray ends again; another command may have been faster, and its
    pool stays."""
    starts: list[Future[local.Pool]] = []
    with ThreadPoolExecutor(1) as beside:

        def begin() -> Future[local.Pool]:
            if not starts:
                starts.append(beside.submit(local.up, config, began=began.append))
            return starts[0]

        try:
            yield begin
        except BaseException:
            for start in starts:
                start.add_done_callback(lambda _: _stop_all(config, began))  # one that had no process yet
                _stop_all(config, began)
            raise


def _stop_all(config: Config, began: list[local.Pool]) -> None:
    for pool in began:
        local.stop(config, pool)


def check_machine(config: Config) -> None:
    """Raise `PoolUnavailable` saying what is in the way of a start here, for example a port that is taken. Ray would only print its log."""
    found = [finding.words for finding in doctor.surroundings(config, running=False) if not finding.ok]
    if found:
        raise PoolUnavailable(" ".join(found))


def check_room(config: Config) -> None:
    """Raise `ConfigError` if a job could never get its slots."""
    found = doctor.slots(config)
    if not found.ok:
        raise ConfigError(f"There are too few slots. {found.words}", param="pool.slots")


def check_same(running: Config, wanted: Config, model: str | None) -> None:
    """Raise `Conflict` for a change that a running pool cannot take: it takes a new number of replicas and nothing else."""
    same_model = model is None or imports.called(model) == running.default_model
    if same_model and fixed(running) == fixed(_hosting(wanted, running.default_model)):
        return
    raise Conflict("A pool with another configuration runs from this home.", "Stop it with `springtide down`, then start again.")


def fixed(config: Config) -> dict[str, Any]:
    """The part of a configuration that cannot change while the pool runs."""
    return graph.unscaled(config)


def run(config: Config, console: Console, keep_serving: bool, model: str | None = None) -> None:
    """Serve, ask, fine-tune, publish, and ask again. Then keep serving until Ctrl-C, which leaves no process behind.

    The command stops only a pool that it started. Raises `PoolUnavailable` if somebody else stops the pool meanwhile."""
    began_s, began = time.monotonic(), list[local.Pool]()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a service manager's stop and a closed terminal count as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    check_room(config)
    started = False
    try:
        config = up(config, console, model, began)
        started = True
        _loop(config, console)
        console.print(f"The loop took {time.monotonic() - began_s:.0f} s.")
        if keep_serving:
            render.serving(console, config)
            console.print(SERVING[bool(began)])
            while local.find(config):
                time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        _stop(config, console, [pool for pool in began if pool.alive], started)


def _stop(config: Config, console: Console, ours: list[local.Pool], started: bool) -> None:
    """``ours``: what this command started and still runs. The home may have another's pool by now, and no pool at all."""
    running = bool(ours) or local.find(config) is not None
    if not running and started:
        raise PoolUnavailable("The pool was stopped, or has ended by itself.", f"Its log is {config.home / 'pool.log'}.")
    if not running:
        return  # the error says why it did not start
    if ours:
        with console.status("Stopping every process of the pool…"):
            _stop_all(config, ours)
        console.print("Stopped. The store keeps every version, and `make run` continues from it.")
    else:
        console.print("The pool keeps running. `springtide down` stops it.")


def _grow(config: Config, console: Console) -> None:
    console.print(f"The store has no [bold]{config.default_model}[/] yet. Training one from the text that ships with Springtide.")
    made = jobs.drawn(_documents(config, "pretrain", name=config.default_model), "Pretraining")
    console.print(f"Registered [bold]{made.get('version', config.default_model)}[/].")


def _documents(config: Config, verb: str, **options: Any) -> Callable[[], Job]:
    """Start a job on a pool that has no gateway yet. Each call of the result reads the job's record from the store."""
    from cluster.pool import submit  # which imports Ray

    documents = submit.follow(config, submit.start(config, verb, **options), interval_s=0)
    return lambda: Job.model_validate(next(documents))


def _loop(config: Config, console: Console) -> None:
    model, pool = config.default_model, client.of(config)
    history = pool.history(model).moves
    first = history[0].stable
    lesson = lesson_for(pool.version(first).manifest)
    if len(history) > 1:
        console.print("This store has been through the loop already. These are the answers of its versions:")
    else:
        _show_answer(console, lesson.question, pool.ask(model, lesson.question))
        console.print(f"Fine-tuning on the text of {lesson.about} while version {first.n} keeps serving.")
        options = {"data": lesson.data, "base": model, "name": model, "publish": True, **lesson.recipe}
        made = jobs.follow(pool, jobs.start(pool, "finetune", options), "Fine-tuning")
        words = "into live traffic" if made.get("stage") == "live" else f"; its rollout is {made.get('stage')}"
        console.print(f"Published [bold]{made.get('version')}[/] {words}.")
        history = pool.history(model).moves
    # A fleet no longer serves weights that were replaced.
    first_too = [str(first)] if first != history[-1].stable and str(first) in pool.served() else []
    render.answers(console, lesson.question, [pool.ask(name, lesson.question) for name in (*first_too, model)])


def lesson_for(first: Manifest) -> Lesson:
    """What to teach a model, by its first version: the seedling knows only its own questions."""
    return TIDE if (first.lineage.job or "").startswith("pretrain") else ISLAND


def _show_answer(console: Console, question: str, answer: client.Answer) -> None:
    console.print(f"“{question}” → [bold]{answer.version}[/]: {escape(answer.text)}")


def _hosting(config: Config, model: str) -> Config:
    values = config.dump()
    own = values["fleets"][config.default_fleet] if values["fleets"] else values["fleet"]
    own["model"] = model
    return parse(values)
