"""A sharded run learns what an unsharded one does: real processes and process groups, a real model, no Ray."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import Config, parse
from cluster.store.registry import registry_of
from cluster.types import Lineage
from jobs.data.pairs import PairRow
from jobs.data.rows import Row
from jobs.training.objectives.distill import Distilling
from jobs.training.objectives.dpo import PreferenceOptimization
from jobs.training.objectives.finetune import SupervisedFineTuning
from jobs.training.process_group import ProcessGroup, joined
from jobs.training.step.flat import MESSAGES, FlatParameters
from jobs.training.work import Work
from tests.workers import Workers

EXAMPLES, BATCH, EPOCHS = 20, 4, 6
STEPS = EPOCHS * EXAMPLES // BATCH
LORA = {"rank": 4, "alpha": 8}


def rows() -> list[Row]:
    """Of many lengths, so that the workers have different numbers of portions."""
    made = torch.Generator().manual_seed(0)
    lengths = [3 + 7 * (i % 6) for i in range(EXAMPLES)]
    return [Row(torch.randint(2, 61, (length,), generator=made).tolist(), length // 2) for length in lengths]


class Tuning(SupervisedFineTuning):
    """One thread, because several of these share a machine."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A store with a model whose rows three workers do not share evenly, and whose output layer is its embedding."""
    home = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=61,
        max_position_embeddings=64,
        hidden_size=20,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(home / "small")
    config = parse({"home": str(home), "store": (home / "store").as_uri(), "training": {"threads_per_worker": 1}})
    registry_of(config).register("small", "weights", None, home / "small", Lineage())
    return config


def settings(config: Config, **recipe: Any) -> dict[str, Any]:
    chosen = {"learning_rate": 0.01, "precision": "float32", "global_batch": BATCH, "epochs": EPOCHS, "micro_batch_tokens": 40}
    data = rows()
    return {"config": config.dump(), "recipe": {**chosen, **recipe}, "base": "small@1", "train": data, "held_out": data[:7]}


@pytest.fixture
def crew(config: Config, tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    made: list[Workers] = []

    def start(work: Callable[[dict[str, Any]], Work] = Tuning, more: dict[str, Any] | None = None, **recipe: Any) -> Workers:
        folder = tmp_path / f"run-{len(made)}"
        folder.mkdir()
        made.append(Workers(folder, EPOCHS, work, **{**settings(config, **recipe), **(more or {}), "run": folder.name}))
        return made[-1]

    yield start
    for workers in made:
        workers.end()


def result(workers: Workers) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    [file] = (workers.folder / "store/runs/run/result").glob("*.safetensors")
    return load_file(file)


def alone(workers: Workers) -> dict[str, float]:
    workers.start(0)
    workers.train(0)
    [end] = workers.answers(0)
    assert end.ended and end.step == STEPS, end
    return end.metrics


def changing(workers: Workers) -> dict[str, float]:
    """Three workers, then one, two and three; no step is lost."""
    workers.start(0, 1, 2)
    first = 0
    for some, told in (((0, 1, 2), 1), ((2,), 2), ((1, 2), 1)):
        workers.train(*some)
        workers.until(told, first + 2)
        workers.stop(told)
        outcomes = workers.answers(*some)
        assert {one.first for one in outcomes} == {first}, outcomes
        assert len({one.step for one in outcomes}) == 1 and not any(one.broken for one in outcomes), outcomes
        first = outcomes[0].step
        assert 0 < first < STEPS
    workers.train(1, 0, 2)
    ends = workers.answers(1, 0, 2)
    assert {one.first for one in ends} == {first} and ends[0].ended, ends
    return ends[0].metrics


@pytest.mark.parametrize("recipe", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
def test_three_then_one_then_two_then_three_learn_what_one_unsharded_does(crew: Callable[..., Workers], recipe: Any) -> None:
    whole, sharded = crew(**recipe), crew(**recipe, sharding="fsdp")
    expected, found = alone(whole), changing(sharded)
    for name in ("eval_loss_before", "eval_loss", "train_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    assert expected["eval_loss"] < 0.99 * expected["eval_loss_before"]
    before, after = result(whole), result(sharded)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=2e-3) for name in before)


PAIRS = [PairRow(row, Row([*row.input_ids[: row.prompt_tokens], 7, 5 + row.prompt_tokens], row.prompt_tokens)) for row in rows()]
PREFERENCES: dict[str, Any] = {"train": PAIRS, "held_out": PAIRS[:7]}
TEACHER: dict[str, Any] = {"teacher": "small@1", "student": "small@1", "size": ()}


@pytest.mark.parametrize(
    ("work", "more", "recipe"),
    [
        (PreferenceOptimization, PREFERENCES, {"preference": {}}),
        (PreferenceOptimization, PREFERENCES, {"preference": {}, "lora": LORA}),
        (Distilling, TEACHER, {"distillation": {}}),
        (Distilling, {**TEACHER, "student": "", "size": (1,)}, {"distillation": {"divergence": "reverse"}}),
    ],
    ids=["preferences", "preferences, adapter", "distillation", "distillation, pruned"],
)
def test_other_objectives_learn_what_one_unsharded_does(crew: Callable[..., Workers], work: Any, more: Any, recipe: Any) -> None:
    whole, sharded = crew(work, more, **recipe), crew(work, more, **recipe, sharding="fsdp")
    expected, found = alone(whole), changing(sharded)
    for name, value in expected.items():
        if name not in ("seconds", "preference_accuracy"):  # whether a pair is preferred may hang on the last digit
            assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert expected["eval_loss"] < 0.99 * expected["eval_loss_before"]
    before, after = result(whole), result(sharded)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=4e-3) for name in before)


def test_each_worker_has_a_slice_of_the_teacher(config: Config, tmp_path: Path) -> None:
    made: Any = Distilling({**settings(config, sharding="fsdp", distillation={}), **TEACHER})
    with joined(ProcessGroup(1, 0, 1, (tmp_path / "rendezvous").as_uri()), cuda=False):
        made.form(0, 1)
        assert all(isinstance(one, DTensor) for one in made.teacher.parameters())


def test_a_worker_that_is_killed_costs_the_steps_since_the_newest_checkpoint(crew: Callable[..., Workers]) -> None:
    whole, sharded = crew(), crew(sharding="fsdp")
    expected = alone(whole)
    sharded.start(0, 1, 2)
    sharded.train(0, 1, 2)
    sharded.until(2, 3)
    sharded.stop(2)
    kept = sharded.answers(0, 1, 2)[0].step
    sharded.train(0, 1, 2)
    sharded.until(2, kept + 2)
    sharded.kill(2)
    broken = sharded.answers(0, 1)
    assert all(one.broken for one in broken) and max(one.step for one in broken) > kept
    sharded.train(0, 1)
    ends = sharded.answers(0, 1)
    assert {one.first for one in ends} == {kept}, "what the lost worker had is gone"
    assert ends[0].metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)


def test_a_damaged_piece_sends_all_workers_to_the_checkpoint_before(crew: Callable[..., Workers]) -> None:
    sharded = crew(sharding="fsdp")
    sharded.start(0, 1)
    kept: list[int] = [0]
    for _ in range(2):
        sharded.train(0, 1)
        sharded.until(1, kept[-1] + 2)
        sharded.stop(1)
        kept.append(sharded.answers(0, 1)[0].step)
    file = sharded.folder / f"store/runs/run/{kept[-1]:012d}/1-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")  # of the second worker's slices alone
    sharded.train(0, 1)
    assert {one.first for one in sharded.answers(0, 1)} == {kept[-2]}


class Counting(Tuning):
    """Writes down the bytes of parameters, gradients and moments that it has after a step, and the most memory that it took."""

    def measure(self, rank: int, world: int) -> dict[str, float]:
        flat: Any = self.flat
        trained = [flat.vector] if isinstance(flat, FlatParameters) else [*flat.slices.values()]
        moments = sum(one.nbytes for some in flat.optimizer.state.values() for one in some.values() if one.ndim)
        held = moments + 2 * sum(one.nbytes for one in trained)
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (self.folder_of_counts / str(rank)).write_text(f"{held} {peak_kb}")
        return super().measure(rank, world)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.folder_of_counts = Path(settings["counts"])


@pytest.mark.parametrize("recipe", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
def test_in_bfloat16_and_with_recomputation_the_gradient_stays_about_the_same(
    config: Config, tmp_path: Path, recipe: Any
) -> None:
    fast = {**recipe, "precision": "bfloat16", "gradient_checkpointing": True}
    exact, sharded = Tuning(settings(config, **recipe)), Tuning(settings(config, **fast, sharding="fsdp"))
    with joined(ProcessGroup(1, 0, 1, (tmp_path / "rendezvous").as_uri()), cuda=False):
        sharded.form(0, 1)
        if sharded.slices:
            sharded.slices.fill(0, 1)
        losses = [made.gradients([0, 1, 2, 3, 4], 0, 1)[0].item() for made in (exact, sharded)]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        length = [made.flat.exchange(torch.zeros(MESSAGES))[1] for made in (exact, sharded)]
    assert length[1] == pytest.approx(length[0], rel=0.05) and length[0] > 0
    found: Any = sharded.flat
    gradients = found.gradient if recipe else torch.cat([one.grad.flatten() for one in found.slices.values()])
    whole: Any = exact.flat
    assert gradients.dtype == torch.float32 and torch.cosine_similarity(gradients, whole.gradient, dim=0) > 0.99


@pytest.mark.parametrize(("sharding", "part"), [("none", 1.0), ("fsdp", 1 / 3)])
def test_three_workers_have_a_third_of_the_state_each(config: Config, tmp_path: Path, sharding: str, part: float) -> None:
    (tmp_path / "counts").mkdir()
    workers = Workers(tmp_path, 1, Counting, **settings(config, epochs=1, sharding=sharding), counts=str(tmp_path / "counts"))
    workers.start(0, 1, 2)
    workers.train(0, 1, 2)
    assert all(not one.broken for one in workers.answers(0, 1, 2))
    workers.end()
    state_bytes = 4 * 4 * sum(one.numel() for one in result(workers).values())
    for rank in range(3):
        held, peak_kb = map(int, (tmp_path / f"counts/{rank}").read_text().split())
        print(f"{sharding} rank={rank} state_bytes={held} of {state_bytes} peak_mb={peak_kb / 1e3:.0f}")
        assert held == pytest.approx(part * state_bytes, rel=0.12), "the rows are not a multiple of three"
