"""Direct preference optimisation without Ray: pairs as they are read, the loss, and real models that learn what is preferred."""

import json
import math
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from cluster.config import Config, parse
from cluster.errors import ConfigError, DataError, JobFailed
from cluster.store.objects import Store
from jobs.data import pairs
from jobs.data.pairs import PairRow
from jobs.data.rows import Row
from jobs.training import recipe as recipes
from jobs.training.objectives.dpo import REFERENCE, PreferenceOptimization, hopeless, losses
from jobs.training.process_group import ProcessGroup, joined
from jobs.training.recipe import Preference, Recipe
from jobs.training.work import gather, update
from tests.unit.test_data import Letters
from tests.unit.test_objectives import registered

USER = {"role": "user", "content": "Tide?"}
HIGH, LOW = {"role": "assistant", "content": "High."}, {"role": "assistant", "content": "Low."}
TOOL = {"type": "function", "function": {"name": "tide_now", "parameters": {"type": "object", "properties": {}}}}
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [HIGH], "non_preferred_output": [LOW]}
TEXTS = {"prompt": "Tide?", "chosen": "High.", "rejected": "Low."}
MESSAGES = {"prompt": [USER], "chosen": [HIGH], "rejected": [LOW]}
IMPLICIT = {"chosen": [USER, HIGH], "rejected": [USER, LOW]}


def read(*lines: Any) -> list[pairs.Pair]:
    return list(pairs.parse(b"\n".join(json.dumps(line).encode() for line in lines), "pairs.jsonl"))


# the data


def test_all_forms_give_the_same_pair() -> None:
    found = read(OPENAI, TEXTS, MESSAGES, IMPLICIT, {**OPENAI, "input": {"messages": [USER], "tools": None}})
    assert [pair.line for pair in found] == [1, 2, 3, 4, 5]
    sides = [(pair.chosen._replace(line=0), pair.rejected._replace(line=0)) for pair in found]
    assert sides == [sides[0]] * 5
    assert (found[0].chosen.prompt, found[0].chosen.completion, found[0].rejected.completion) == ([USER], [HIGH], [LOW])


def test_tools_are_of_both_answers_and_a_prompts_answers_are_not_learnt() -> None:
    prompt = [USER, {**HIGH, "weight": 1}, USER]
    [one] = read({**OPENAI, "input": {"messages": prompt, "tools": [TOOL], "parallel_tool_calls": True}})
    [other] = read({"chosen": [*prompt, HIGH], "rejected": [*prompt, LOW], "tools": [TOOL]})
    assert one == other
    assert one.chosen.prompt == [USER, HIGH, USER] and one.chosen.tools == one.rejected.tools == (TOOL,)


WRONG = [
    ({**TEXTS, "score": 3}, "the keys are 'prompt', 'chosen', 'rejected', 'score'"),
    ({"prompt": "Tide?", "chosen": "High."}, "the keys are 'prompt', 'chosen'"),
    ({"prompt": "Tide?", "completion": "High."}, '{"prompt": ..., "chosen": ..., "rejected": ...}'),
    ({**OPENAI, "tools": [TOOL]}, "the tools stand beside 'input'"),
    ({**OPENAI, "input": [USER]}, "'input' is a JSON array"),
    ({**OPENAI, "input": {"messages": [USER], "model": "m"}}, "the keys of 'input' are 'messages', 'model'"),
    ({**OPENAI, "input": {"messages": []}}, "'input.messages' is empty"),
    ({**OPENAI, "preferred_output": "High."}, "'preferred_output' is a JSON string"),
    ({**OPENAI, "preferred_output": [HIGH, HIGH]}, "'preferred_output' has 2 messages"),
    ({**OPENAI, "non_preferred_output": [USER]}, "the answer in 'non_preferred_output' is by user"),
    ({**OPENAI, "non_preferred_output": [HIGH]}, "both answers are the same"),
    ({**TEXTS, "rejected": "High."}, "both answers are the same"),
    ({**TEXTS, "rejected": " "}, "rejected.content is empty"),
    ({**MESSAGES, "prompt": [{**USER, "role": "bot"}]}, "prompt[0] has the unknown role 'bot'"),
    ({**MESSAGES, "prompt": [HIGH]}, "before any user message"),
    ({**MESSAGES, "chosen": [{**HIGH, "weight": 0}]}, "weight 0"),
    ({**MESSAGES, "prompt": [USER, HIGH, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "answers the call 'c'"),
    ({**TEXTS, "tools": ["f"]}, "tools[0] is no function"),
    ({**IMPLICIT, "rejected": [{**USER, "content": "Ebb?"}, LOW]}, "have no beginning in common"),
    ({**IMPLICIT, "rejected": [USER, LOW, USER, LOW]}, "differ from message 1 on"),
    ({"chosen": [HIGH], "rejected": [LOW]}, "there is no prompt before the answers"),
    ({"chosen": "High.", "rejected": "Low."}, "'chosen' is a JSON string"),
    (["High.", "Low."], "where an object should be"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_line_is_named_with_what_to_do(line: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(TEXTS, line)
    assert str(caught.value).startswith("pairs.jsonl, line 2: ") and words in str(caught.value) and caught.value.do


def test_an_empty_file_says_what_a_line_looks_like(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty.*non_preferred_output"):
        pairs.read(str(tmp_path / "empty.jsonl"))


def test_a_pair_with_a_side_that_is_too_long_is_left_out_and_named() -> None:
    long = {**TEXTS, "rejected": "x" * 100}
    fitting = pairs.tokenize(read(TEXTS, long, TEXTS), Letters(), max_tokens=50)
    assert ([pair.line for pair in fitting.examples], fitting.too_long) == ([1, 3], [2])
    [row, _] = fitting.rows
    assert (bytes(row.chosen.input_ids), bytes(row.rejected.input_ids)) == (b"uTide?.aHigh..", b"uTide?.aLow..")
    learnt, held_out = fitting.parted(0.5, seed=0)
    assert {len(learnt.rows), len(held_out.rows)} == {1} and learnt.examples != held_out.examples


# the recipe


def test_the_section_is_the_verbs_own() -> None:
    assert recipes.load("lora", [], verb="dpo").preference == Preference()
    assert recipes.load("lora", []).preference is None
    with pytest.raises(ConfigError, match="springtide dpo alone"):
        recipes.load("lora", ["preference.beta=1"])


# the loss


def test_a_model_that_prefers_as_the_base_does_has_the_loss_of_a_coin() -> None:
    coin = torch.zeros(1)
    assert losses(coin, Preference()).item() == pytest.approx(math.log(2))
    assert losses(coin, Preference(label_smoothing=0.3)).item() == pytest.approx(math.log(2))
    assert losses(coin, Preference(beta=0.5, loss="ipo")).item() == pytest.approx(1.0)
    for how in (Preference(), Preference(label_smoothing=0.1), Preference(loss="ipo"), Preference(beta=2, loss="ipo")):
        assert losses(coin, how).item() < hopeless(how)


def test_smoothing_has_its_least_loss_where_the_model_is_as_unsure_as_the_labels() -> None:
    deltas = torch.linspace(-80, 80, 1601)
    best = deltas[losses(deltas, Preference(label_smoothing=0.1)).argmin()]
    assert torch.sigmoid(0.1 * best).item() == pytest.approx(0.9, abs=0.005)


# a real model


def side(start: int, answer: list[int]) -> Row:
    prompt = [start + i for i in range(6)]
    return Row(prompt + answer, len(prompt))


PAIRS = [PairRow(side(2 + n, [50] * (2 + n % 4)), side(2 + n, [51 + n % 3] * (3 + n % 5))) for n in range(24)]
"""After every prompt the answer of 50s is preferred to one of others, whose lengths differ."""
WHOLE = list(range(8))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return registered(tmp_path)


def work(config: Config, train: list[PairRow] = PAIRS[:16], run: str = "run", **recipe: Any) -> Any:
    values = {"learning_rate": 0.01, "precision": "float32", "preference": {}, **recipe}
    settings = {"config": config.dump(), "recipe": values, "base": "small@1", "train": train, "held_out": PAIRS[16:], "run": run}
    return PreferenceOptimization(settings)


@contextmanager
def alone(tmp_path: Path) -> Iterator[None]:
    with joined(ProcessGroup(1, 0, 1, (tmp_path / "meet").as_uri()), cuda=False):
        yield


def by_hand(made: PreferenceOptimization, row: Row) -> float:
    """The answer's log-probability, by the model's own loss, in nats."""
    labels = [-100] * row.prompt_tokens + row.input_ids[row.prompt_tokens :]
    with torch.no_grad():
        mean = made.model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
    return -mean.item() * answer(row)


def answer(row: Row) -> int:
    return len(row.input_ids) - row.prompt_tokens


@pytest.mark.parametrize("how", [{}, {"beta": 0.5, "label_smoothing": 0.2}, {"loss": "ipo"}])
def test_the_loss_is_the_papers(config: Config, tmp_path: Path, how: Any) -> None:
    made = work(config, preference=how)
    with alone(tmp_path):
        made.measure(0, 1)
    before = [(by_hand(made, pair.chosen), by_hand(made, pair.rejected)) for pair in PAIRS[:3]]
    with torch.no_grad():
        made.flat.vector.mul_(1.3)
    expected, beta = 0.0, how.get("beta", 0.1)
    for pair, (chosen, rejected) in zip(PAIRS[:3], before, strict=True):
        gains = by_hand(made, pair.chosen) - chosen, by_hand(made, pair.rejected) - rejected
        if "loss" in how:
            expected += (gains[0] / answer(pair.chosen) - gains[1] / answer(pair.rejected) - 1 / (2 * beta)) ** 2 / 3
        else:
            margin, noise = torch.tensor(beta * (gains[0] - gains[1])), how.get("label_smoothing", 0)
            expected -= ((1 - noise) * logsigmoid(margin) + noise * logsigmoid(-margin)).item() / 3
    loss, tokens = made.gradients([0, 1, 2], 0, 1)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert tokens == sum(len(row.input_ids) for pair in PAIRS[:3] for row in pair), "of both sides"


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_the_gradient_depends_on_neither_the_workers_nor_the_portions(config: Config, tmp_path: Path, lora: Any) -> None:
    whole, parts = work(config, lora=lora, micro_batch_tokens=4096), work(config, lora=lora, micro_batch_tokens=50)
    with alone(tmp_path):
        whole.measure(0, 1)
    loss, tokens = whole.gradients(WHOLE, 0, 1)
    for world in (1, 2, 3, 8):
        parts.flat.clear()
        shares = [parts.gradients(WHOLE, rank, world) for rank in range(world)]
        assert {share[1] for share in shares} == {tokens}
        assert sum(share[0].item() for share in shares) == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(parts.flat.gradient, whole.flat.gradient, rtol=1e-4, atol=1e-6) and whole.flat.gradient.any()


@pytest.mark.parametrize("recipe", [{}, {"lora": {"rank": 4, "alpha": 8}}, {"preference": {"loss": "ipo", "beta": 0.3}}])
def test_a_model_learns_what_is_preferred(config: Config, tmp_path: Path, recipe: Any) -> None:
    made = work(config, epochs=8, global_batch=8, **recipe)
    with alone(tmp_path):
        before = made.measure(0, 1)
        for step, batch in enumerate(made.schedule.batches()):
            update(made, step, gather(made, batch, 0, 1).norm)
        after = made.measure(0, 1)
    assert (before["preference_accuracy"], before["reward_margin"]) == (0.5, 0.0)
    assert after["preference_accuracy"] == 1.0 and after["reward_margin"] > 0.1
    assert after["eval_loss"] < before["eval_loss"] < made.hopeless
    made.save(tmp_path / "made")
    assert (tmp_path / "made" / ("adapter_model.safetensors" if "lora" in recipe else "model.safetensors")).exists()


def test_the_reference_is_the_bases_and_stays_it(config: Config, tmp_path: Path) -> None:
    made = work(config, lora={"rank": 4, "alpha": 8})
    expected = [[by_hand(made, pair.chosen), by_hand(made, pair.rejected)] for pair in PAIRS]
    with alone(tmp_path):
        made.measure(0, 1)
        update(made, 0, gather(made, WHOLE, 0, 1).norm)
        made.measure(0, 1)
        late = work(config, lora={"rank": 4, "alpha": 8})  # joins after the step: it gets the state, and reads what is kept
        for name, tensor in made.flat.tensors(1).items():
            late.flat.tensors(1)[name].copy_(tensor)
        assert late.measure(0, 1) == pytest.approx(made.measure(0, 1), rel=1e-5)
    for one in (made, late):
        found = torch.cat([one.kept.read()["train"], one.kept.read()["held_out"]])
        assert torch.allclose(found, torch.tensor(expected), rtol=1e-4)


def test_a_reference_that_is_lost_is_never_made_of_a_trained_model(config: Config, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=REFERENCE):
        work(config).gradients(WHOLE, 0, 1)
    late = work(config)
    late.flat.tensors(5)  # as a restored state leaves it
    with alone(tmp_path), pytest.raises(JobFailed, match=REFERENCE):
        late.measure(0, 1)


def measure(settings: dict[str, Any], rank: int, meet: str, pipe: Any) -> None:
    made = work(parse(settings))
    with joined(ProcessGroup(1, rank, 3, meet), cuda=False):
        pipe.send((made.measure(rank, 3), made.kept.read()["train"].tolist()))


def test_three_workers_share_the_base_out_and_find_what_one_finds(config: Config, tmp_path: Path) -> None:
    context, ours = multiprocessing.get_context("spawn"), []
    for rank in range(3):
        near, far = context.Pipe()
        ours.append(near)
        context.Process(target=measure, args=(config.dump(), rank, (tmp_path / "three").as_uri(), far), daemon=True).start()
    answers = [pipe.recv() if pipe.poll(120) else None for pipe in ours]
    assert answers[0] is not None and answers == [answers[0]] * 3
    one = work(config, run="alone")
    with alone(tmp_path):
        assert one.measure(0, 1) == pytest.approx(answers[0][0])
    assert torch.allclose(one.kept.read()["train"], torch.tensor(answers[0][1]), rtol=1e-5)
    assert Store(config.store).size(f"runs/run/{REFERENCE}")


def test_the_learning_rate_is_a_fraction_of_fine_tunings() -> None:
    preferences, facts = (Recipe.model_validate({"lora": {}, **more}).resolved(128, 1024) for more in ({"preference": {}}, {}))
    assert preferences.learning_rate and facts.learning_rate
    assert preferences.learning_rate == pytest.approx(facts.learning_rate * recipes.PREFERENCE_RATE)
