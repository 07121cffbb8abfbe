"""Distillation on one worker: a student learns from the data, and from what a frozen teacher says of every token of it.

The loss of an answer's token is (1 − α) · cross entropy + α · T² · KL, where KL compares the distributions of teacher and student at the
temperature T (Hinton et al. 2015). T² keeps the size of the gradient, which falls as 1 / T². The forward KL is the default: on a fixed text its
minimum is the teacher's own distribution, as that of the cross entropy is. The reverse one lets a small student leave out what the teacher finds
possible; it is mostly used on the student's own answers (Agarwal et al. 2023).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from cluster.config import Config, parse
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, VersionId
from jobs.data.rows import Row
from jobs.training.objectives.finetune import device_of, ready, save_whole, stored, trainable
from jobs.training.objectives.held_out import answer_tokens, answers_of, summed
from jobs.training.objectives.objective import Losses
from jobs.training.objectives.prune import Size, pruned
from jobs.training.objectives.tokens import NextTokens
from jobs.training.recipe import Distillation, Recipe
from jobs.training.sharding.sharded import Sharded, passes
from jobs.training.step.flops import per_token
from jobs.training.step.packed import pack
from jobs.training.step.packing import portions
from jobs.training.step.precision import computing
from jobs.training.step.vocabulary import by_chunks

PLAIN = Distillation(temperature=1)
"""How `Distilling.measure` compares, whatever the recipe minimises: runs with other recipes can be compared by it."""

Compare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""Of the student's logits, the teacher's and the targets of some tokens: numbers for each token, each of shape (tokens,)."""


class Distilling(NextTokens):
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "teacher", "student", "size", "train", "held_out"}``.

    ``teacher`` is the id of a version, and ``student`` that of a weights version. An empty ``student`` is the teacher, pruned to ``size``. Making
    one reads both from the store: every worker prunes by itself, and all come to the same weights.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        torch.set_num_threads(config.training.threads_per_worker)
        self.how = recipe.distillation or Distillation()
        registry, id = registry_of(config), settings["student"] or settings["teacher"]
        self.folder = registry.fetch(registry.manifest(registry.resolve(id).weights), config.home / "cache")
        size, device = Size(*settings["size"]), device_of(config)

        def read() -> Any:
            return loaded(config, registry, registry.manifest(VersionId.parse(settings["teacher"])))

        teacher = read()
        if settings["student"]:
            student, weights = trainable(recipe, self.folder), stored(self.folder, recipe)
        else:
            student, weights = ready(recipe, smaller_copy(teacher, size)), lambda: smaller_copy(read(), size).state_dict()
        super().__init__(recipe, student, settings["train"], settings["held_out"], device, weights)
        self.teacher = frozen(teacher, getattr(torch, recipe.precision))
        # The teacher runs forward only: half of what per_token counts for frozen weights.
        self.ideal_s_per_token *= 1 + bool(self.how.weight) * per_token(self.teacher) / 2 / per_token(student)
        self.sharded_teacher = Sharded(self.teacher, lambda: read().state_dict(), None, device) if self.sharded else None
        self.teacher = None if self.sharded else self.teacher.to(device)

    def form(self, rank: int, world: int) -> None:
        """Cut the teacher anew too, if the student is sharded."""
        super().form(rank, world)
        if self.sharded_teacher:
            self.teacher = None
            self.sharded_teacher.form(world)
            self.sharded_teacher.fill(rank, world)
            self.teacher = self.sharded_teacher.module

    def losses(self, portion: list[Row]) -> Losses:
        if not self.how.weight:
            return super().losses(portion)
        told, distance = self._summed(
            portion, lambda own, its, targets: (cross_entropies(own, targets), divergence(own, its, self.how))
        )
        return Losses((1 - self.how.weight) * told + self.how.weight * self.how.temperature**2 * distance, told)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """``{"eval_loss", "teacher_divergence", "teacher_loss"}``, in nats per token of the held-out answers.

        ``eval_loss`` is the student's cross entropy, which training alone has too, and ``teacher_loss`` the teacher's. ``teacher_divergence`` is
        the forward KL at the temperature 1. All workers of the process group call this together.
        """
        self.model.eval()
        rows, tokens = self.held_out, [len(row.input_ids) for row in self.held_out]
        shares = [portions(range(len(rows))[first::world], tokens, self.limit_tokens) for first in range(world)]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for portion in passes(self.model, shares, rank):
            with computing(self.recipe, self.device):
                found = self._summed([rows[i] for i in portion or [0]], all_three)
            sums += found if portion else 0
        self.model.train()
        nats, answers = summed(sums.tolist(), self.device), sum(map(answer_tokens, rows))
        return dict(zip(("eval_loss", "teacher_divergence", "teacher_loss"), (each / answers for each in nats), strict=True))

    def _summed(self, rows: Sequence[Row], compare: Compare) -> torch.Tensor:
        """What ``compare`` makes of every answer token's logits, summed over the tokens: a tensor of shape (numbers,)."""
        student = answers_of(self.model, rows)
        with torch.no_grad():
            teacher = answers_of(self.teacher, rows)

        def compute(own: torch.Tensor, its: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.stack(compare(student.logits(own), teacher.logits(its), targets), dim=1)

        return by_chunks(compute, student.chunk_tokens, student.states, teacher.states, student.targets).sum(0)

    def save(self, target: Path) -> None:
        """Write all weights in the precision of the student or teacher that they come from, and that version's other files."""
        save_whole(self.plain, self.weights(), self.folder, target)


# the loss


def all_three(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `Distilling.measure` sums up, in its order."""
    return cross_entropies(student, targets), divergence(student, teacher, PLAIN), cross_entropies(teacher, targets)


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each token. Shape (tokens,)."""
    return cross_entropy(logits, targets, reduction="none")


def divergence(student: torch.Tensor, teacher: torch.Tensor, how: Distillation) -> torch.Tensor:
    """How far the student's distributions are from the teacher's, both softened: a tensor of shape (tokens,), in nats.

    ``student`` and ``teacher``: logits of shape (tokens, vocabulary). Models of one family pad the vocabulary to different sizes; what only one of
    them has is no token, and is left out.

    >>> one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> divergence(one, other, Distillation(temperature=1)), divergence(one, one, Distillation())
    (tensor([0.1109]), tensor([0.]))
    """
    known = min(student.shape[1], teacher.shape[1])
    of, to = (log_softmax(logits[:, :known] / how.temperature, dim=1) for logits in (teacher, student))
    if how.divergence == "reverse":
        of, to = to, of
    return kl_div(to, of, reduction="none", log_target=True).sum(1)


# the models


def loaded(config: Config, registry: Registry, manifest: Manifest) -> Any:
    """A version as transformers loads it, in the precision of its file. An adapter is added to its base's weights, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    cache, adapter = config.home / "cache", manifest.kind == "adapter"
    folder = registry.fetch(registry.manifest(manifest.weights), cache)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if adapter else "auto", local_files_only=True)
    return PeftModel.from_pretrained(model, str(registry.fetch(manifest, cache))).merge_and_unload() if adapter else model


def smaller_copy(teacher: Any, size: Size) -> Any:
    """A new model in float32 with a part of the teacher's weights. Raises `ConfigError` where the teacher cannot be pruned."""
    weights, shape = pruned(teacher.state_dict(), teacher.config.to_dict(), size)
    student = type(teacher)(type(teacher.config).from_dict(shape)).float()
    student.load_state_dict(weights)
    student.generation_config = teacher.generation_config
    return student


def frozen(teacher: Any, dtype: torch.dtype) -> Any:
    """The teacher as it answers: without dropout, and without gradients."""
    teacher = teacher.to(dtype).eval().requires_grad_(False)
    pack(teacher)
    return teacher
