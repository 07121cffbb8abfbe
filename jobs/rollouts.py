"""Rollouts: answers of a run's newest weights to its prompts, from the replicas that serve clients, and what they are worth.

Three kinds of threads run in the job's driver, beside the loop that trains::

    workers ── register an adapter after each step ──▶ store
    Held ── sees it there, lets the fleet hold it (`Client.hold_interims`), removes older ones
    Rollouts ── asks the gateway for answers of the newest held one, rewards them ──▶ store ──▶ workers

Each request names an exact version, so it is known how old the weights were that answered. It has a low priority: in an engine's queue clients go
first. A replica that is lost costs its requests, and they are asked again.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, quantiles
from typing import Any, NamedTuple, Protocol

from cluster.client import Client
from cluster.control.interims import RENEW_S
from cluster.errors import (
    AnswerTimeout,
    ContextExceeded,
    DataError,
    JobFailed,
    ModelNotFound,
    Quarantined,
    SpringtideError,
)
from cluster.store.objects import Store
from cluster.store.versions import Versions
from cluster.types import VersionId, interim_name
from jobs.answers import PASSING
from jobs.training.objectives.rewards import Reward, RewardFailed
from jobs.training.objectives.samples import Exchange, Group, Sample, step_of, with_advantages
from jobs.training.recipe import Reinforcement
from jobs.training.schedule import Schedule
from jobs.training.state.checkpoints import Checkpoints

LOOK_S = 0.1
"""How often the store is asked for newer weights."""
WAITS_S = (0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 60, 60, 60, 60, 60, 60)
"""How long a question waits before it is asked again, where the pool has no room or a replica was lost."""
PATIENCE_S = 120
"""How long the fleet may fail to hold the newest weights."""
LATER = 1
"""The priority of requests: clients have 0, and go first."""
MEASURED = 256
"""Held-out prompts that are asked each time, at most."""
PRUNED_STEPS = 20
"""How often the answers are removed that no worker needs any more."""
SPARE = 2
"""Versions that are held beside those that rollouts may use: the one that is coming, and the one that requests in flight still use."""
WARNED = 100
"""Warnings in the log."""


class Prompt(NamedTuple):
    """One line of the data."""

    ids: list[int]
    """As the base's chat template writes it, up to where the answer begins."""
    text: str
    """What the user says last."""
    reference: str
    """The line's own answer."""
    line: int


class Task(NamedTuple):
    """What a run samples."""

    run: str
    prompts: list[Prompt]
    held_out: list[Prompt]
    schedule: Schedule
    how: Reinforcement
    seed: int
    reward: Reward


class Told(NamedTuple):
    """How the answers of one step were."""

    reward: float
    """The mean."""
    no_signal: float
    """The share of groups whose answers all had the same reward: nothing is learnt from them."""
    cut: float
    """The share of answers that were cut off."""
    behind: float
    """How many steps the weights that answered are behind, the mean."""
    failed: int
    """Answers without a reward, because the reward failed."""
    seconds: float


Tell = Callable[[int, Told], None]
"""Hears of each step's answers."""


# which versions the fleet holds


class Control(Protocol):
    """What a run asks of `cluster.control.client.Client`."""

    def hold_interims(self, run: str, versions: list[str], places: int) -> None: ...
    def end_interims(self, run: str) -> None: ...


class Held:
    """The run's interim versions that the fleet holds. One thread calls `look`."""

    def __init__(self, versions: Versions, control: Control, run: str, staleness: int) -> None:
        self.versions, self.control, self.run, self.places = versions, control, run, staleness + SPARE
        self.ring: list[tuple[int, VersionId]] = []
        """Step and version, oldest first, at most ``places``."""
        self.published_s: list[float] = []
        """Seconds from each update until all replicas held its weights."""
        self.renewed_s = float("-inf")

    @property
    def newest(self) -> tuple[int, VersionId] | None:
        return self.ring[-1] if self.ring else None

    def at(self, step: int) -> VersionId | None:
        """The version with the weights after ``step`` steps."""
        return next((id for at, id in reversed(self.ring) if at == step), None)

    def look(self, now_s: float) -> None:
        """Let the fleet hold what is new in the store. Raises `SpringtideError`."""
        known = {id for _, id in self.ring}
        for manifest in self.versions.recent(interim_name(self.run), self.places):
            if manifest.id not in known:
                self._renew([*known, manifest.id], now_s)
                self.published_s.append(time.time() - manifest.lineage.metrics["updated_s"])
                self._push(step_of(manifest), manifest.id)
        if self.ring and now_s - self.renewed_s > RENEW_S:
            self._renew(list(known), now_s)

    def _renew(self, ids: Sequence[VersionId], now_s: float) -> None:
        self.control.hold_interims(self.run, [str(id) for id in sorted(ids)], self.places)
        self.renewed_s = now_s

    def _push(self, step: int, id: VersionId) -> None:
        self.ring, over = pushed(self.ring, (step, id), self.places)
        for _, old in over:
            self.versions.remove(old)

    def end(self) -> None:
        """Nothing of the run is needed any more but the numbers of its versions."""
        for _, id in self.ring:
            self.versions.remove(id)
        self.control.end_interims(self.run)


def pushed(
    ring: Sequence[tuple[int, VersionId]], new: tuple[int, VersionId], places: int
) -> tuple[list[tuple[int, VersionId]], list[tuple[int, VersionId]]]:
    """The ring with one more version, and those that have to go.

    A run that goes on from an older checkpoint makes versions of the same steps again: those before stand for weights that are no more.

    >>> one, two, three, again = ((step, VersionId("m", n)) for n, step in ((1, 7), (2, 8), (3, 9), (4, 8)))
    >>> [[id.n for _, id in part] for part in pushed([one, two, three], again, 3)], [len(part) for part in pushed([one, two], three, 2)]
    ([[1, 4], [2, 3]], [2, 1])
    """
    kept = [*(old for old in ring if old[0] < new[0]), new][-places:]
    return kept, [old for old in ring if old not in kept]


# asking


class Rollouts:
    """Makes the answers of each step as soon as the weights that may answer are held, and measures weights when that is due."""

    def __init__(self, task: Task, pool: Client, held: Held, store: Store, tell: Tell) -> None:
        self.task, self.pool, self.held, self.tell = task, pool, held, tell
        self.exchange, self.checkpoints = Exchange(store, task.run), Checkpoints(store, task.run)
        self.threads = ThreadPoolExecutor(max(1, task.how.at_once // task.how.group), thread_name_prefix="asks")
        self.over = threading.Event()
        self.failure: Exception | None = None
        self.warned: list[str] = []
        """What the log has said."""

    def start(self) -> None:
        for name, body in (("held", self._watch), ("rollouts", self._make)):
            threading.Thread(target=self._guarded, args=(body,), name=name, daemon=True).start()

    def check(self) -> None:
        """Raise what has stopped the rollouts."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Stop, without waiting for answers."""
        self.over.set()
        self.threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(SpringtideError):  # control is away: what the run holds there expires
            self.held.end()

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:  # noqa: BLE001 (the driver raises it)
            if not self.over.is_set():
                self.failure = error

    def _watch(self) -> None:
        well_s = time.monotonic()
        while not self.over.wait(LOOK_S):
            try:
                self.held.look(time.monotonic())
                well_s = time.monotonic()
            except SpringtideError as error:  # control or the store is away for a moment, or a replica could not read the version
                if time.monotonic() - well_s > PATIENCE_S:
                    raise
                self._warn(f"the fleet does not hold the newest weights yet: {error}")

    def _make(self) -> None:
        """From the step that the run is at: one that was resumed has done others before."""
        schedule, first = self.task.schedule, self._await(0)
        for step, batch in enumerate(schedule.batches(first), start=first):
            if self.exchange.rollouts(step) is None:
                self._await(max(0, step - self.task.how.staleness))
                self._step(step, batch)
            if step % PRUNED_STEPS == 0:
                self.exchange.forget_rollouts(min(self.checkpoints.steps(), default=0))
        self._await(schedule.steps)
        self._measure()

    def _await(self, step: int) -> int:
        """Wait until the fleet holds weights that have done so many steps; how many they have. Measure meanwhile."""
        while not self.over.is_set():
            self._measure()
            if self.held.newest is not None and self.held.newest[0] >= step:
                return self.held.newest[0]
            self.over.wait(LOOK_S / 2)
        raise Over

    # one step

    def _step(self, step: int, batch: Sequence[int]) -> None:
        began_s, scale = time.monotonic(), self.task.how.scale
        asked = [group for group in self.threads.map(lambda index: self._group(step, index), batch) if group]
        failed = sum(one.failed for one in asked)
        groups = [with_advantages(one.group, scale) for one in asked if one.group.samples]
        if not groups:
            raise JobFailed(f"No answer of step {step + 1} has a reward: {self._why()}.")
        self.exchange.put_rollouts(step, groups)
        self.tell(step, told(groups, failed, time.monotonic() - began_s))

    def _group(self, step: int, index: int) -> "Asked | None":
        """All answers to one prompt; None where the pool cannot answer it."""
        prompt, how = self.task.prompts[index], self.task.how
        seed = random.Random(f"{self.task.seed}/{step}/{index}").getrandbits(31)  # noqa: S311 (replicas would repeat each other's answers)
        said = self._ask(prompt, {"n": how.group, "temperature": 1, "seed": seed, "logprobs": 0})
        if said is None:
            return None
        at, id, choices = said
        samples = [self._sample(prompt, choice, str(id), step - at) for choice in choices]
        rewarded = [one for one in samples if one is not None]
        return Asked(Group(index, rewarded), len(samples) - len(rewarded))

    def _sample(self, prompt: Prompt, choice: dict[str, Any], version: str, behind: int) -> Sample | None:
        """One answer with its reward; None where the reward fails, which costs this answer only."""
        reward = self._reward(prompt, choice)
        if reward is None:
            return None
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        return Sample(ids, logprobs, choice["finish_reason"] == "length", version, behind, reward)

    def _reward(self, prompt: Prompt, choice: dict[str, Any]) -> float | None:
        try:
            return self.task.reward(prompt.text, choice["text"], prompt.reference)
        except RewardFailed as error:
            self._warn(f"line {prompt.line}: {error}")
            return None

    def _ask(self, prompt: Prompt, wanted: dict[str, Any], at: int | None = None) -> "Said | None":
        """Ask the newest weights, or those after ``at`` steps; again where the pool has no room, or a replica was lost."""
        waits_s = iter(WAITS_S)
        while not self.over.is_set():
            newest = self.held.newest if at is None else (at, self.held.at(at))
            assert newest is not None and newest[1] is not None  # noqa: S101 (`_await` has seen one, and the newest is never removed)
            try:
                answer = self.pool.complete(request(newest[1], prompt.ids, self.task.how, wanted))
                return Said(newest[0], newest[1], answer.choices)
            except (ContextExceeded, AnswerTimeout, Quarantined) as error:
                self._warn(f"line {prompt.line} is left out: {error}")
                return None
            except SpringtideError as error:
                if error.status == 400:
                    raise DataError(f"Line {prompt.line}: the fleet refuses it: {error}", "Remove the line.") from error
                wait_s = next(waits_s, None)
                if wait_s is None or not (error.status in PASSING or isinstance(error, ModelNotFound)):
                    raise
                self.over.wait(wait_s)
        raise Over

    # measuring

    def _measure(self) -> None:
        """Measure the newest weights if that is due. Nobody trains meanwhile, so they stay the newest."""
        newest, schedule = self.held.newest, self.task.schedule
        if newest is None or not (newest[0] in (0, schedule.steps) or schedule.measures_after(newest[0])):
            return
        if self.exchange.measured(newest[0]) is None:
            self.exchange.put_measured(newest[0], self._measured(newest[0]))

    def _measured(self, step: int) -> dict[str, float]:
        """``{"reward"}``: the mean over greedy answers to held-out prompts, and what is known of the run so far."""
        asked = self.task.held_out[:MEASURED]
        rewards = [one for one in self.threads.map(lambda prompt: self._greedy(step, prompt), asked) if one is not None]
        if not rewards:
            raise JobFailed(f"No held-out answer has a reward: {self._why()}.")
        p50_s, p99_s = middle_and_worst(self.held.published_s)
        return {"reward": fmean(rewards), "publish_p50_s": p50_s, "publish_p99_s": p99_s}

    def _greedy(self, step: int, prompt: Prompt) -> float | None:
        said = self._ask(prompt, {"temperature": 0}, at=step)
        return self._reward(prompt, said.choices[0]) if said else None

    def _why(self) -> str:
        return self.warned[-1] if self.warned else "the pool answers no prompt"

    def _warn(self, words: str) -> None:
        """Once, and not again for each answer; at most `WARNED` different ones."""
        if words not in self.warned and len(self.warned) < WARNED:
            print(words, flush=True)
            self.warned.append(words)


class Over(Exception):
    """The run has ended."""


class Said(NamedTuple):
    """What the pool has answered."""

    step: int
    """How many steps the weights that answered had done."""
    version: VersionId
    choices: list[dict[str, Any]]


class Asked(NamedTuple):
    """The answers to one prompt."""

    group: Group
    failed: int
    """Answers for which the reward failed."""


@contextlib.contextmanager
def rolling(task: Task, pool: Client, control: Control, versions: Versions, store: Store, tell: Tell) -> Iterator[Rollouts]:
    """Rollouts that go on during the block."""
    for id in versions.interims(task.run):  # of a driver before this one
        versions.remove(id)
    rollouts = Rollouts(task, pool, Held(versions, control, task.run, task.how.staleness), store, tell)
    rollouts.start()
    try:
        yield rollouts
    finally:
        rollouts.close()


def request(version: VersionId, prompt_ids: list[int], how: Reinforcement, wanted: dict[str, Any]) -> dict[str, Any]:
    """One request. The engine samples from its raw distribution, so that the log-probabilities that it tells are those it sampled by: it would
    else take a temperature, a top-k or a penalty from the model's generation_config.json.

    >>> request(VersionId("m", 3), [1, 2], Reinforcement(answer_tokens=8), {"temperature": 0})["max_tokens"]
    8
    """
    plain = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    body = {"model": str(version), "prompt": prompt_ids, "max_tokens": how.answer_tokens, "return_token_ids": True}
    return {**body, "priority": LATER, **plain, **wanted}


def told(groups: Sequence[Group], failed: int, seconds: float) -> Told:
    """
    >>> one, other = (Sample([1], [-0.1], False, "m@1", 1, reward) for reward in (1.0, 0.0))
    >>> told([Group(0, [one, other]), Group(1, [one, one])], 0, 2.0)
    Told(reward=0.75, no_signal=0.5, cut=0.0, behind=1.0, failed=0, seconds=2.0)
    """
    samples = [one for group in groups for one in group.samples]
    silent = [len({one.reward for one in group.samples}) == 1 for group in groups]
    return Told(
        fmean(one.reward for one in samples),
        fmean(silent),
        fmean(one.cut for one in samples),
        fmean(one.behind for one in samples),
        failed,
        seconds,
    )


def middle_and_worst(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile.

    >>> middle_and_worst([0.2]), middle_and_worst([0.0, 1.0])
    ((0.2, 0.2), (0.5, 0.99))
    """
    cuts = quantiles([*seconds, seconds[-1]] if len(seconds) == 1 else seconds, n=100, method="inclusive")
    return cuts[49], cuts[98]
