"""Distillation on one worker without Ray: the loss, the pruned student, and what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.normalizers import Lowercase
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cluster.config import Config, parse
from cluster.errors import BadRequest, ConfigError
from cluster.jobspec import parse as options_from
from cluster.store.registry import registry_of
from cluster.types import Lineage, Manifest, VersionId
from jobs.data.chat import Example
from jobs.data.rows import Row
from jobs.distill import difference, opened_pair
from jobs.training import recipe
from jobs.training.objectives.distill import Distilling, loaded
from jobs.training.objectives.finetune import SupervisedFineTuning
from jobs.training.objectives.prune import Size, kept_layers, pruned, smaller
from jobs.training.process_group import ProcessGroup, Rendezvous, joined
from jobs.training.work import update

ROWS = [Row(list(range(2, 2 + length)), prompt) for length, prompt in ((4, 3), (30, 5), (9, 0), (17, 16), (12, 4), (40, 20))]
WHOLE = list(range(len(ROWS)))
WHOLE_SIZE = Size()
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The store has two untrained models, ``teacher@1`` and ``student@1``. The teacher is sure of what it says."""
    home = tmp_path_factory.mktemp("distill")
    config = parse({"home": str(home), "store": (home / "store").as_uri()})
    for seed, (name, layers) in enumerate({"teacher": 4, "student": 2}.items()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, "initializer_range": 0.4}))
        model.save_pretrained(home / name)
        (home / name / "tokenizer_config.json").write_text('{"of": "the teacher"}')
        registry_of(config).register(name, "weights", None, home / name, Lineage())
    return config


def work(config: Config, student: str = "student@1", size: Size = WHOLE_SIZE, **given: Any) -> Any:
    how = {key: given.pop(key) for key in ("temperature", "weight", "divergence") if key in given}
    chosen = {"learning_rate": 0.01, "precision": "float32", "distillation": how, **given}
    settings = {"teacher": "teacher@1", "student": student, "size": size, "train": ROWS, "held_out": ROWS}
    return Distilling({"config": config.dump(), "recipe": chosen, **settings})


def measured(made: Distilling) -> dict[str, float]:
    with joined(ProcessGroup(1, 0, 1, Rendezvous().open(one_machine=True)), False):
        return made.measure(0, 1)


# the loss


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_loss_is_the_formula(config: Config, divergence: str) -> None:
    made = work(config, temperature=3, weight=0.3, divergence=divergence)
    expected, answers = torch.zeros(()), 0
    for row in (ROWS[1], ROWS[4]):
        ids = torch.tensor([row.input_ids])
        student, teacher = (model(input_ids=ids).logits[0, row.prompt_tokens - 1 : -1] for model in (made.model, made.teacher))
        p, q = ((logits / 3).softmax(1) for logits in (teacher, student))
        if divergence == "reverse":
            p, q = q, p
        kl = (p * (p / q).log()).sum()
        data = cross_entropy(student, ids[0, row.prompt_tokens :], reduction="sum")
        expected, answers = expected + 0.7 * data + 0.3 * 9 * kl, answers + len(student)
    wanted = torch.autograd.grad(expected / answers, list(made.model.parameters()))
    made.gradients([1, 4], 0, 1)
    assert torch.allclose(made.flat.gradient, torch.cat([each.flatten() for each in wanted]), rtol=1e-3, atol=1e-6)


def test_without_weight_the_teacher_changes_nothing(config: Config) -> None:
    made = work(config, weight=0)
    settings = {"base": "student@1", "train": ROWS, "held_out": [], "config": config.dump()}
    alone: Any = SupervisedFineTuning({**settings, "recipe": {"learning_rate": 0.01, "precision": "float32"}})
    assert made.gradients(WHOLE, 0, 1)[0].item() == pytest.approx(alone.gradients(WHOLE, 0, 1)[0].item())
    assert torch.equal(made.flat.gradient, alone.flat.gradient)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_gradient_depends_on_neither_the_workers_nor_the_portions(config: Config, world: int) -> None:
    whole, parts = work(config), work(config, micro_batch_tokens=20)
    loss, tokens = whole.gradients(WHOLE, 0, 1)
    shares = [parts.gradients(WHOLE, rank, world) for rank in range(world)]
    assert {share[1] for share in shares} == {tokens}
    assert sum(share[0].item() for share in shares) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(parts.flat.gradient, whole.flat.gradient, rtol=1e-3, atol=1e-5) and whole.flat.gradient.any()


def test_a_student_that_is_its_teacher_is_not_drawn_anywhere(config: Config) -> None:
    made = work(config, student="teacher@1", weight=1)
    made.gradients(WHOLE, 0, 1)
    assert made.flat.gradient.abs().max() < 1e-6
    found = measured(made)
    assert found["teacher_divergence"] == pytest.approx(0, abs=1e-6) and found["eval_loss"] == pytest.approx(
        found["teacher_loss"]
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_distilled_student_is_nearer_to_its_teacher_than_one_trained_alone(config: Config, precision: str) -> None:
    """The data are random, so they do not say what the teacher says."""
    after: dict[float, dict[str, float]] = {}
    for weight in (0.0, 0.9):
        made = work(config, weight=weight, precision=precision, epochs=40, schedule="constant", warmup_fraction=0)
        began = measured(made)
        for step in range(40):
            made.gradients(WHOLE, 0, 1)
            update(made, step, made.flat.gradient.norm().item())
        after[weight] = measured(made)
        assert after[weight]["teacher_loss"] == pytest.approx(began["teacher_loss"]), "the teacher stays as it is"
    assert after[0.9]["teacher_divergence"] < began["teacher_divergence"] / 2
    assert after[0.9]["teacher_divergence"] < after[0.0]["teacher_divergence"] / 2
    assert after[0.0]["eval_loss"] < after[0.9]["eval_loss"]


def test_a_vocabulary_that_is_padded_further_is_the_same(config: Config) -> None:
    """The sizes of one family share a tokenizer, and pad the output layer to different widths."""
    made = work(config, weight=1)
    before = made.gradients(WHOLE, 0, 1)
    gradient = made.flat.gradient.clone()
    made.flat.clear()
    made.teacher.resize_token_embeddings(96)
    assert made.gradients(WHOLE, 0, 1)[1] == before[1] and torch.allclose(made.flat.gradient, gradient, atol=1e-6)


def test_an_adapter_teaches_with_its_base(config: Config, tmp_path: Path) -> None:
    registry = registry_of(config)
    settings = {"config": config.dump(), "base": "teacher@1", "train": ROWS, "held_out": []}
    tuned: Any = SupervisedFineTuning(
        {**settings, "recipe": {"learning_rate": 0.01, "precision": "float32", "lora": {"rank": 4}}}
    )
    with torch.no_grad():
        tuned.flat.vector.add_(0.1)
    tuned.save(tmp_path)
    adapter = registry.register("tuned", "adapter", VersionId("teacher", 1), tmp_path, Lineage())
    ids = torch.tensor([ROWS[1].input_ids])
    merged, base = (loaded(config, registry, registry.manifest(id)) for id in (adapter.id, VersionId("teacher", 1)))
    with torch.no_grad():
        wanted, found, other = (model.eval()(input_ids=ids).logits for model in (tuned.model, merged, base))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3) and not torch.allclose(found, other, atol=0.1)


# the pruned student


def test_layers_that_stay_keep_their_weights(config: Config) -> None:
    weights = loaded(config, registry_of(config), registry_of(config).manifest(VersionId("teacher", 1))).state_dict()
    made = work(config, student="", size=Size(2))
    for name, trained in made.model.state_dict().items():
        before = name.replace("layers.1.", "layers.3.")
        assert torch.equal(trained, weights[before]), name
    assert len(made.model.model.layers) == 2 and made.gradients(WHOLE, 0, 1)[0] > 0


def test_the_heaviest_neurons_stay(config: Config) -> None:
    """Half of the teacher's neurons have no weight, so the student without them says the same."""
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if "up_proj" in name:
                weight[torch.randperm(128)[:64]] = 0
    weights, shape = pruned(teacher.state_dict(), teacher.config.to_dict(), Size(width=0.5))
    student = LlamaForCausalLM(LlamaConfig.from_dict(shape)).eval()
    student.load_state_dict(weights)
    assert student.config.intermediate_size == 64 and weights["model.layers.0.mlp.down_proj.weight"].shape == (16, 64)
    ids = torch.tensor([ROWS[1].input_ids])
    assert torch.allclose(student(input_ids=ids).logits, teacher(input_ids=ids).logits, atol=1e-5)


def test_what_is_saved_is_a_smaller_model_with_the_teachers_other_files(config: Config, tmp_path: Path) -> None:
    made = work(config, student="", size=Size(3, 0.5))
    made.save(tmp_path)
    shape = json.loads((tmp_path / "config.json").read_text())
    assert {key: shape[key] for key in SHAPE} == {**SHAPE, "num_hidden_layers": 3, "intermediate_size": 64}
    assert str(config.home) not in json.dumps(shape)
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"of": "the teacher"}'
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    for (name, saved), trained in zip(again.named_parameters(), made.model.parameters(), strict=True):
        assert torch.equal(saved, trained), name


def test_what_each_layer_has_of_its_own_goes_with_it() -> None:
    """Qwen's attention has biases, and its configuration names the kind of each layer."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    teacher = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1, layer_types=kinds, eos_token_id=[1, 2, 3, 4]))
    weights, shape = pruned(teacher.state_dict(), teacher.config.to_dict(), Size(2))
    assert shape["layer_types"] == [kinds[layer] for layer in kept_layers(4, 2)] and shape["eos_token_id"] == [1, 2, 3, 4]
    Qwen2ForCausalLM(Qwen2Config.from_dict(shape)).load_state_dict(weights)


@pytest.mark.parametrize(
    ("names", "size", "words"),
    [
        (["model.layers.0.mlp.experts.gate_up_proj"], Size(1), "olmo has another layout of weights than Llama's"),
        (["model.layers.0.mlp.gate_proj.weight_packed"], Size(1), "another layout"),
        (["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], Size(1), "another layout"),
        (["model.layers.0.mlp.up_proj.weight"], Size(2), "There are 1 layers, so 2 cannot be kept"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(names: list[str], size: Size, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        smaller({"model_type": "olmo", "num_hidden_layers": 1, "intermediate_size": 128}, names, size)


# what is refused before anything starts


def tokenizer(*words: str) -> Any:
    vocabulary = {word: i for i, word in enumerate(words)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, words[0])))
    made.chat_template = "{{ messages }}"
    return made


def test_versions_with_other_tokens_are_refused_and_the_shorter_context_counts(config: Config, tmp_path: Path) -> None:
    registry, made = registry_of(config), dict[str, Manifest]()
    for name, words, context in (("long", ("low", "high"), 512), ("short", ("low", "high"), 128), ("other", ("low", "sea"), 128)):
        LlamaForCausalLM(LlamaConfig(**{**SHAPE, "max_position_embeddings": context})).save_pretrained(tmp_path / name)
        tokenizer(*words).save_pretrained(tmp_path / name)
        made[name] = registry.register(name, "weights", None, tmp_path / name, Lineage())
    data = [Example([{"role": "user", "content": "low"}], [{"role": "assistant", "content": "high"}], 1)]
    chosen = recipe.load("distill", [], verb="distill")
    for teacher, student in (("short", "long"), ("long", "short")):
        assert opened_pair(config, registry, made[teacher], made[student], chosen, data).limit_tokens == 128
    with pytest.raises(BadRequest, match=r"long@1 and other@1 have different tokenizers: the token 'high'.*--by answers"):
        opened_pair(config, registry, made["long"], made["other"], chosen, data)


def test_tokenizers_that_differ_are_told_apart_by_a_token() -> None:
    assert difference(tokenizer("low", "high"), tokenizer("low", "high"), ["low"]) == ""
    assert difference(tokenizer("low", "high"), tokenizer("high", "low"), []) == "the token 'high' is 1 in one and 0 in the other"
    assert difference(tokenizer("low"), tokenizer("low", "sea"), []) == "the token 'sea' is missing in one and 1 in the other"


def test_tokenizers_with_the_same_tokens_may_encode_in_two_ways() -> None:
    one, other = tokenizer("low", "Low"), tokenizer("low", "Low")
    other.backend_tokenizer.normalizer = Lowercase()
    assert difference(one, other, ["low", "Low"]) == "they encode 'Low' in two ways"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "there is no student"),
        ({"layers": 2}, "a new student needs a name"),
        ({"student": "small@1", "layers": 2}, "--student is trained as it is"),
        ({"name": "x", "width": 1.5}, "--width: "),
    ],
)
def test_a_request_has_one_student(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        options_from("distill", {"data": "x", "teacher": "seedling", **given})
    assert words in str(caught.value)


def test_a_section_that_another_verb_would_ignore_is_refused() -> None:
    chosen = recipe.load("distill", ["distillation.temperature=4"], verb="distill")
    assert chosen.distillation == recipe.Distillation(temperature=4)
    with pytest.raises(ConfigError, match="distillation is for springtide distill alone"):
        recipe.load("distill", [])
