"""Every option of every job, typed once: ``python -m jobs.VERB``, `springtide VERB` and ``POST /admin/jobs`` read the same models.

A field is an option: ``eval_data`` is ``--eval-data`` on a command line and ``"eval_data"`` in a JSON document. Its docstring is its help.

>>> parse("finetune", {"data": "s3://bucket/lines.jsonl", "workers": "1-4"}).arguments()
['--data=s3://bucket/lines.jsonl', '--workers=1-4']
"""

import argparse
import inspect
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, Self, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from cluster.config import Training
from cluster.errors import BadRequest
from cluster.redact import redact_source
from cluster.types import Version

ORIGIN = "JOB_ORIGIN"
"""Set to ``http`` in the environment of a job that came over HTTP; see `jobs.sources` for what that forbids."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True)
class Takes:
    """How an option is taken from a command line."""

    file: bool = False
    """A path or URL. The CLI uploads a local file and sends ``upload:<sha256>`` instead of its path."""
    positional: bool = False
    metavar: str | None = None


class Workers(NamedTuple):
    """How many workers a job may have: ``1-4`` is at least one and at most four, ``2`` is two at all times."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"

    @classmethod
    def parse(cls, text: object) -> "Workers":
        """
        >>> Workers.parse("1-4"), Workers.parse(2)
        (Workers(least=1, most=4), Workers(least=2, most=2))
        """
        found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", str(text))
        if found is None:
            raise ValueError(f"{str(text)[:40]!r} is no number of workers; write 2, or 1-4 for at least one and at most four")
        workers = cls(int(found[1]), int(found[2] or found[1]))
        if not 1 <= workers.least <= workers.most:
            raise ValueError(f"{workers} starts below 1 or ends below its start")
        return workers


File = Annotated[str, Takes(file=True)]
Range = Annotated[Workers, BeforeValidator(Workers.parse), PlainSerializer(str, return_type=str), Takes(metavar="MIN-MAX")]
Trainer = Literal["elastic", "ray_train"]
Which = Annotated[Version, Takes(positional=True, metavar="NAME@N")]


class Options(BaseModel):
    """What a job is asked to do. Only what was given is in `arguments` and `document`: defaults are the job's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    verb: ClassVar[str]
    about: ClassVar[str]

    def document(self) -> dict[str, Any]:
        """The options that were given, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)

    def arguments(self) -> list[str]:
        """The command line of the same job, after ``python -m jobs.VERB``."""
        given = self.document()
        words = [word for option in options_of(type(self)) if not option.positional for word in _words(option, given)]
        return words + [str(given[option.name]) for option in options_of(type(self)) if option.positional]

    def files(self) -> dict[str, list[str]]:
        """The options given that name files: name → paths, URLs or ``upload:…``."""
        given = self.document()
        named = {option.name: given.get(option.name) for option in options_of(type(self)) if option.file}
        return {name: value if isinstance(value, list) else [value] for name, value in named.items() if value}

    def with_files(self, sources: dict[str, list[str]]) -> dict[str, Any]:
        """`document` with other paths or URLs in the place of those of `files`."""
        given = self.document()
        return {**given, **{name: new if isinstance(given[name], list) else new[0] for name, new in sources.items()}}

    def recorded(self) -> dict[str, Any]:
        """`document` for a record that others read: without what a URL may carry as a secret."""
        return self.with_files({name: [*map(redact_source, sources)] for name, sources in self.files().items()})


class Trains(Options):
    """What every job takes that trains."""

    epochs: float | None = None
    """How often each example is seen; the recipe's by default."""
    set: Annotated[list[str], Takes(metavar="KEY=VALUE")] = []
    """Override a key of the recipe. Repeatable."""
    workers: Range | None = None
    """How many workers it may have: 2, or 1-4; the pool's training.min_workers and training.workers by default."""
    priority: int = 0
    """Where slots are few, jobs of a higher priority have them first."""
    resume: Annotated[str, Takes(metavar="RUN")] = ""
    """Go on with a run that was lost, from its newest checkpoint."""


class Tuning(Trains):
    """What every job takes that starts from a version."""

    data: File
    """JSON lines: a path or URL."""
    eval_data: File | None = None
    """Measure on this file instead of a held-out part of --data."""
    base: str | None = None
    """A model, or a version as NAME@N; by default what the pool serves."""
    name: str | None = None
    """Register as the next version of this name; the base's by default."""
    recipe: File
    """The name of a recipe, or the path of a YAML file."""
    trainer: Trainer = "elastic"
    """elastic: workers come and go between two steps. ray_train: Ray Train's TorchTrainer, which starts all of them again."""
    publish: bool = False
    """Make the result live."""


class Finetune(Tuning):
    verb = "finetune"
    about = "Fine-tune a version and register the result."

    data: File
    """JSON lines in OpenAI's chat format, or prompt and completion: a path or URL."""
    recipe: File = "lora"
    """lora, full, or the path of a YAML file."""
    full: bool = False
    """Train all the weights: --recipe full."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.full and self.recipe not in ("lora", "full"):
            raise ValueError("--full and --recipe exclude each other")
        return self


class Distill(Trains):
    verb = "distill"
    about = "Train a small student on what a teacher says, and register it."

    data: File
    """JSON lines in OpenAI's chat format, or prompt and completion: a path or URL."""
    eval_data: File | None = None
    """Measure on this file instead of a held-out part of --data."""
    teacher: str
    """A model, or a version as NAME@N: weights or an adapter."""
    by: Literal["logits", "answers"] = "logits"
    """logits: of the same tokenizer, on the answers of --data. answers: the teacher is served, and answers the prompts of --data itself."""
    student: str | None = None
    """A model or version to train on; without it, the student is the teacher pruned."""
    layers: int | None = Field(None, ge=1)
    """Keep so many of the teacher's layers."""
    width: float | None = Field(None, gt=0, lt=1)
    """Keep this fraction of the neurons in each feed-forward layer of the teacher."""
    name: str | None = None
    """Register as the next version of this name; the student's by default."""
    recipe: File | None = None
    """distill, or the path of a YAML file; with --by answers full, or one for springtide train."""
    trainer: Trainer = "elastic"
    """elastic: workers come and go between two steps. ray_train: Ray Train's TorchTrainer, which starts all of them again."""
    publish: bool = False
    """Make the result live."""

    @model_validator(mode="after")
    def check(self) -> Self:
        prunes = self.layers is not None or self.width is not None
        if self.student is not None and prunes:
            raise ValueError("--student is trained as it is: --layers and --width are for a student made of the teacher")
        if self.student is None and not prunes:
            raise ValueError("there is no student: name one with --student, or make one of the teacher with --layers or --width")
        if self.student is None and self.name is None:
            raise ValueError("a new student needs a name: --name")
        if self.student is None and self.by == "answers":
            raise ValueError("a pruned student has its teacher's tokenizer, and learns more by logits")
        return self


class Dpo(Tuning):
    verb = "dpo"
    about = "Teach a version which of two answers is preferred, and register the result."

    data: File
    """JSON lines with pairs of answers, in OpenAI's form or TRL's: a path or URL."""
    recipe: File = "dpo"
    """dpo, or the path of a YAML file."""


class Rl(Trains):
    verb = "rl"
    about = "Train an adapter on rewards of its own answers, which the pool's replicas give, and register it."

    data: File
    """JSON lines in OpenAI's chat format, or prompt and completion: a path or URL. The completions are the reward's references."""
    eval_data: File | None = None
    """Measure on this file instead of a held-out part of --data."""
    reward: str
    """exact, contains, numeric, regex, regex:PATTERN, judge:MODEL, or package.module:function."""
    base: str | None = None
    """A model, or a version as NAME@N, that a fleet serves; by default what the pool serves."""
    name: str | None = None
    """Register as the next version of this name; the base's by default."""
    recipe: File = "rl"
    """rl, or the path of a YAML file."""
    epochs: float | None = None
    """How often each prompt is answered; the recipe's by default."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of --epochs."""
    publish: bool = False
    """Make the result live."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs exclude each other")
        return self


class Pretrain(Trains):
    verb = "pretrain"
    about = "Train a new model on your own text, or the seedling that ships with Springtide, and register it."

    data: Annotated[list[str], Takes(file=True, metavar="TEXT")] = []
    """UTF-8 text, or JSON lines with {"text": "..."}: files, folders, URLs. Repeatable. Without it the job trains the seedling."""
    name: str = ""
    """The model's name; the next version of it is registered. "seedling" for the seedling."""
    depth: int | None = Field(None, ge=1)
    """The one dial of the model's size: so many layers, each 64 wide for each layer. 4 by default."""
    layers: int | None = Field(None, ge=1)
    """Layers, where --depth does not fit."""
    hidden_size: int | None = Field(None, ge=32, multiple_of=32)
    """Width, where --depth does not fit: a multiple of 32, which is one attention head."""
    architecture: File | None = None
    """A config.json of any architecture that transformers knows, instead of --depth."""
    tokenizer: str | None = None
    """Take the tokenizer of this model or version; by default a new one is learnt from the text."""
    vocabulary: int | None = Field(None, ge=300, le=1 << 18)
    """Tokens of the new tokenizer; by default about the square root of the text's characters."""
    context_tokens: int | None = Field(None, ge=16)
    """How many tokens the model sees at a time; 512 by default."""
    recipe: File = "pretrain"
    """pretrain, or the path of a YAML file."""
    epochs: float | None = None
    """How often the text is seen; the recipe's by default."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of --epochs; 300 for the seedling."""
    trainer: Trainer = "elastic"
    """elastic: workers come and go between two steps. ray_train: Ray Train's TorchTrainer, which starts all of them again."""
    live: bool | None = None
    """Move the alias; by default only if there is none yet."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.data and not self.name:
            raise ValueError("a model that is trained on --data needs a --name")
        if not self.data and (other := sorted(self.model_fields_set - SEEDLING)):
            raise ValueError(f"--{other[0].replace('_', '-')} needs --data; the seedling has its own")
        for one, other in (("steps", "epochs"), ("architecture", "depth"), ("tokenizer", "vocabulary")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"--{one} and --{other} exclude each other")
        return self


SEEDLING = {"data", "name", "steps", "hidden_size", "layers", "live"}
"""The options of `Pretrain` that the seedling knows."""


class Evaluate(Options):
    verb = "evaluate"
    about = "Measure a version and store the gate's verdict with it."

    version: Which
    """NAME@NUMBER, for example seedling@2."""
    alias: str | None = None
    """Compare with what this alias means; the version's own name by default."""
    against: Version | None = None
    """Compare with this version instead."""
    held_out: File = ""
    """Examples for the loss: a path or URL; publishing.held_out by default."""
    tasks: File = ""
    """Examples for the accuracy: a path or URL; publishing.tasks by default."""
    golden: File = ""
    """Prompts with assertions: a path or URL; publishing.golden by default."""
    priority: int = 0
    """Where slots are few, jobs of a higher priority have them first."""


class Publish(Options):
    verb = "publish"
    about = "Make a version live."

    version: Which
    """NAME@NUMBER, for example seedling@2."""
    alias: str | None = None
    """The model name that clients use; the version's own name by default."""
    reason: str = "published by hand"
    """Why, for the alias's history."""


VERBS: dict[str, type[Options]] = {model.verb: model for model in (Finetune, Distill, Dpo, Rl, Pretrain, Evaluate, Publish)}
"""By what `python -m jobs.VERB` is called."""


def new_id(verb: str) -> str:
    """A job's id: the verb and twelve hexadecimal digits. The first eight are the time in seconds, so that names sort by age."""
    return f"{verb}-{int(time.time()):08x}{secrets.token_hex(2)}"


def with_workers(training: Training, workers: Workers | None) -> Training:
    """The pool's training section with a job's own ``--workers``."""
    if workers is None:
        return training
    return training.model_copy(update={"min_workers": workers.least, "workers": workers.most})


# JSON


def check_remote(options: Options) -> None:
    """Raises `BadRequest` where a job that comes over HTTP names a path: it would mean one of the pool's machines. `jobs.sources` checks the
    rest, when it reads."""
    for name, source in ((name, source) for name, sources in options.files().items() for source in sources):
        if source.startswith(("upload:", "sample:")) or ("://" in source and not source.startswith("file:")):
            continue
        if name == "recipe" and "/" not in source and not source.endswith((".yaml", ".yml")):
            continue  # one that ships with Springtide
        raise BadRequest(
            f"{name}: {source[:200]!r} is a path, and the pool cannot read yours.", "Send the file: PUT /admin/uploads.", name
        )


def parse(verb: str, given: dict[str, Any]) -> Options:
    """A checked job from a JSON document or a command line's words. Raises `BadRequest` naming the option and near matches."""
    model = model_of(verb)
    if unknown := [name for name in given if name not in model.model_fields]:
        known = ", ".join(model.model_fields)
        raise BadRequest(
            f"{verb} has no option {unknown[0][:80]!r}.{_did_you_mean(unknown[0], model.model_fields)}",
            f"Options are: {known}.",
            unknown[0][:80],
        )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        words = first["msg"].removeprefix("Value error, ")
        wrong = f"--{name.replace('_', '-')}: {words}." if name else f"{words}."
        raise BadRequest(wrong, f"`python -m jobs.{verb} --help` explains every option.", name) from error


def model_of(verb: str) -> type[Options]:
    if verb in VERBS:
        return VERBS[verb]
    raise BadRequest(f"There is no job {verb[:80]!r}.{_did_you_mean(verb, VERBS)}", f"Jobs are: {', '.join(VERBS)}.", "verb")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean …?`` with the near matches; empty where there are none."""
    close = get_close_matches(name, known, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


# command lines


class Option(NamedTuple):
    """One option, as a command line needs it."""

    name: str
    type: Any
    """``str``, ``int``, ``float`` or ``bool``; text for whatever pydantic reads from text."""
    many: bool
    required: bool
    file: bool
    positional: bool
    metavar: str | None
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def options_of(model: type[Options]) -> list[Option]:
    """What is the verb's own comes first in its help, then what all that train take."""
    found: list[Option] = []
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] in Trains.model_fields):
        takes = next((mark for mark in _marks(field.annotation, field.metadata) if isinstance(mark, Takes)), Takes())
        plain = _plain(field.annotation)
        default = (
            "" if field.is_required() or field.get_default() in (None, "", [], False) else f" [default: {field.get_default()}]"
        )
        many, text = plain is list, plain if plain in (int, float, bool) else str
        words = (field.description or "") + default
        found.append(Option(name, text, many, field.is_required(), takes.file, takes.positional, takes.metavar, words))
    return found


def _marks(annotation: Any, metadata: list[Any]) -> list[Any]:
    """What ``Annotated`` says of a field, of ``X | None`` too."""
    inner = [mark for part in get_args(annotation) if get_origin(part) is Annotated for mark in get_args(part)[1:]]
    return [*metadata, *inner]


def _plain(annotation: Any) -> Any:
    """The type without ``| None`` and ``Annotated``: ``list[str]`` → ``list``."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is list:
        return list
    return _plain(parts[0]) if len(parts) == 1 else annotation


def _words(option: Option, given: dict[str, Any]) -> list[str]:
    value = given.get(option.name)
    if value is None:
        return []
    if option.type is bool:
        return [option.flag if value else f"--no-{option.flag[2:]}"]
    return [f"{option.flag}={one}" for one in (cast(list[Any], value) if option.many else [value])]


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names only, and so do its verbs: ``--epoch`` must not train, nor ``--pub`` publish."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """With the options that are called nearly so."""
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        super().error(message + (_did_you_mean(wrong[0], known) if wrong and "unrecognized" in message else ""))


def command_line(verb: str, words: list[str] | None = None) -> Any:
    """The options of ``python -m jobs.VERB …``, checked. Exits as argparse does where a name is wrong; raises `BadRequest` for a value."""
    model = VERBS[verb]
    parser = Parser(f"jobs.{verb}", description=model.about, argument_default=argparse.SUPPRESS)
    for option in options_of(model):
        if option.positional:
            parser.add_argument(option.name, metavar=option.metavar, help=option.help)
        elif option.type is bool:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=option.help)
        else:
            action = "append" if option.many else "store"
            parser.add_argument(option.flag, action=action, required=option.required, metavar=option.metavar, help=option.help)
    return parse(verb, vars(parser.parse_args(words)))


def options(verb: str) -> Callable[[Decorated], Decorated]:
    """Adds a verb's options to a typer command, which gets those that were given as keywords::

    @app.command()
    @options("finetune")
    def train(wait: …, **given: Any) -> None:
        job = parse("finetune", chosen(given))
    """

    def decorate(command: Decorated) -> Decorated:
        own = [one for one in inspect.signature(command).parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [_parameter(option) for option in options_of(VERBS[verb])]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*added, *own)]
        changed: Any = command
        changed.__signature__ = inspect.Signature(parameters)
        changed.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _parameter(option: Option) -> inspect.Parameter:
    import typer  # here, because jobs have no use for it

    kind: Any = option.type
    plain: Any = list[str] | None if option.many else kind if option.required else kind | None
    if option.positional:
        told: Any = typer.Argument(metavar=option.metavar, help=option.help)
    else:
        flags = f"{option.flag}/--no-{option.flag[2:]}" if kind is bool else option.flag
        told = typer.Option(flags, metavar=option.metavar, help=option.help, show_default=False)
    default = inspect.Parameter.empty if option.required else None
    kind_only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind_only, default=default, annotation=Annotated[plain, told])


def chosen(given: dict[str, Any]) -> dict[str, Any]:
    """The options that somebody gave, of those that typer passes."""
    return {name: value for name, value in given.items() if value is not None and value != []}
