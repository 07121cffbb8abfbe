"""What vLLM 0.29 cannot bear, refused before it gets there. One function per fault, each with its reason. Pure.

`tests.fuzz` finds such requests. Where vLLM can be mended, `deployments.vllm_patches` does that instead.
"""

from collections.abc import Callable

from cluster.errors import BadRequest
from deployments.api.grammars import (
    CAPTURE,
    JSON_STRING,
    Body,
    Grammar,
    as_dict,
    as_list,
    compile_ms,
    depth,
    document,
    expressions,
    grammars,
    objects,
    written,
)
from deployments.api.repetitions import once, plain, written_out

MAX_CHARACTERS = 64 << 10
"""Of one grammar, JSON schema, list of choices or structural tag. The largest tool schemas in use have a tenth of it."""
MAX_ALL_CHARACTERS = 512 << 10
"""Of all of them in one request: they are looked at in the loop that serves everybody's tokens. A hundred tools have room."""
MAX_REGEX_CHARACTERS = 4 << 10
MAX_DEPTH = 64
"""Levels of brackets in a grammar, a schema or a regular expression. Their compilers call themselves for each level."""
MAX_REPEATED = 4_000
"""Characters and classes of a regular expression once its repetitions are written out. Each becomes a state of an automaton. In an EBNF grammar
repetitions may add as many, and as many again as it has without them: a grammar of a programming language has thousands, and 3,000 keywords
take less than a second (`tests.contract.test_xgrammar`)."""
MAX_COMPILE_S = 5.0
"""Of all grammars of a request together, by an estimate. Neither a schema nor an EBNF grammar can be given up on once it is being compiled, and
on two cores an engine compiles one at a time. vLLM itself gives up on a regular expression after as long, but its thread goes on."""
MAX_PATTERN_TOKENS = 64
"""Of a repetition that ``repetition_detection`` looks for."""
MAX_BAD_CHARACTERS = 16 << 10
"""Of all ``bad_words`` together."""


def check(body: Body) -> None:
    """Raise `BadRequest` for a request that the engine cannot bear; ``param`` names what is wrong with it."""
    for refuse in CHECKS:
        refuse(body)


# errors of the engine that are no errors of the client's: it answers 500


def refuse_misshapen(body: Body) -> None:
    """vLLM reads some parameters before it has checked their types: ``{"structured_outputs": []}`` is an AttributeError in it, and in a chat a
    tool without a name beside ``{"tool_choice": {"function": …}}`` a KeyError. Messages and responses name a choice, and a tool, in other
    forms."""
    if not isinstance(body.get("structured_outputs"), dict | None):
        raise BadRequest("`structured_outputs` must be an object.", 'For example {"regex": "[a-z]+"}.', "structured_outputs")
    if "function" in as_dict(body.get("tool_choice")):
        for number, tool in enumerate(as_list(body.get("tools"))):
            if not isinstance(as_dict(as_dict(tool).get("function")).get("name"), str):
                raise BadRequest(
                    f"`tools[{number}]` has no `function.name`.", "Name every tool.", f"tools[{number}].function.name"
                )
    if body.get("messages") == []:
        raise BadRequest("`messages` is empty.", "Send at least one message.", "messages")


# faults that reach other clients' answers


def refuse_chosen_logprobs(body: Body) -> None:
    """With ``logprob_token_ids`` in a batch, every other request of the batch gets the log-probabilities of those tokens instead of its own
    (``v1/sample/sampler.py``: one tensor for all)."""
    if body.get("logprob_token_ids"):
        raise BadRequest(
            "`logprob_token_ids` is not supported: in vLLM it changes other requests' answers.",
            "Ask for `top_logprobs`.",
            "logprob_token_ids",
        )


# requests whose work is out of all proportion


def refuse_long_repetitions(body: Body) -> None:
    """vLLM looks for every length of a repetition, after every token, in the loop that schedules everybody's tokens."""
    size = as_dict(body.get("repetition_detection")).get("max_pattern_size")
    if isinstance(size, int | float) and size > MAX_PATTERN_TOKENS:
        raise BadRequest(
            f"`max_pattern_size` is {size}; at most {MAX_PATTERN_TOKENS} are allowed.",
            "Look for shorter ones.",
            "repetition_detection",
        )


def refuse_many_bad_words(body: Body) -> None:
    """vLLM tokenizes each of them twice in the loop that serves everybody's tokens."""
    count = sum(len(word) for word in as_list(body.get("bad_words")) if isinstance(word, str))
    if count > MAX_BAD_CHARACTERS:
        raise BadRequest(
            f"`bad_words` has {count} characters; at most {MAX_BAD_CHARACTERS} are allowed.", "Send fewer.", "bad_words"
        )


def refuse_bombs(body: Body) -> None:
    """Grammars that take seconds or gigabytes to compile, or whose compiler runs out of stack and takes the engine with it."""
    count = 0
    for grammar in grammars(body):
        text = written(grammar)
        count += len(text)
        _refuse_above(count, MAX_ALL_CHARACTERS, "characters, together with those before it", grammar)
        limit = MAX_REGEX_CHARACTERS if grammar.kind == "regex" else MAX_CHARACTERS
        _refuse_above(len(text), limit, "characters", grammar)
        if grammar.kind == "json":
            _refuse_documents(grammar, text)
        for expression in expressions(grammar):
            _refuse_expressions(expression)


def _refuse_documents(grammar: Grammar, text: str) -> None:
    if sum(map(text.count, "[{")) > MAX_DEPTH:  # most have too few to be so deep
        _refuse_above(depth(JSON_STRING.sub("", text)), MAX_DEPTH, "levels of brackets", grammar)
    if any("patternProperties" in node for node in objects(document(grammar))):
        # Only the backend outlines reads them. It builds its automaton over the whole vocabulary, which has no bound in time.
        raise BadRequest(f"`{grammar.param}` uses `patternProperties`.", "Name the properties.", grammar.param)


def _refuse_expressions(expression: Grammar) -> None:
    """A regular expression or an EBNF grammar, alone or in a JSON document."""
    simple = plain(expression.text, expression.kind)
    _refuse_above(depth(simple), MAX_DEPTH, "levels of brackets", expression)
    count, limit = written_out(simple), MAX_REPEATED
    if expression.kind == "grammar" and count > limit:
        # Its own text is in the count too. Comments and blanks are not, or a long comment would make room for repetitions.
        limit += 2 * once(expression.text, "grammar")
    _refuse_above(count, limit, "characters once its repetitions are written out", expression)
    if expression.kind == "grammar" and ("Regex(" in simple or CAPTURE.search(expression.text)):
        # xgrammar's own: a literal that is a regular expression, and a quoted name in which a bracket does not end the attribute.
        raise BadRequest(
            f"`{expression.param}` uses `Regex(…)` or `capture`.", "Write it with rules and classes.", expression.param
        )


def refuse_slow_grammars(body: Body) -> None:
    """What is small and takes minutes, during which nobody else's grammar is compiled: ``minProperties`` of 200 among 500 properties, a thousand
    properties of the format ``uri``, or ``[a-z]?`` a hundred times in a row."""
    took_s = 0.0
    for grammar in grammars(body):
        took_s += compile_ms(grammar) / 1000
        if took_s > MAX_COMPILE_S:
            raise BadRequest(
                f"What is to be compiled up to `{grammar.param}` would take about {took_s:.0f} s; at most {MAX_COMPILE_S:g} s are allowed.",
                "Use fewer optional properties, formats and patterns, no `minProperties` and `maxProperties`, and in an expression fewer optional "
                "and repeated parts in a row.",
                grammar.param,
            )


def _refuse_above(count: int, limit: int, of_what: str, grammar: Grammar) -> None:
    if count > limit:
        raise BadRequest(
            f"`{grammar.param}` has {count} {of_what}; at most {limit} are allowed.", "Make it simpler.", grammar.param
        )


CHECKS: tuple[Callable[[Body], None], ...] = (
    refuse_misshapen,
    refuse_chosen_logprobs,
    refuse_long_repetitions,
    refuse_many_bad_words,
    refuse_bombs,
    refuse_slow_grammars,
)
