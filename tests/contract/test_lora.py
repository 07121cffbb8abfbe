"""`cluster.capacity.lora` says of each architecture what vLLM 0.29's registry and classes say. Read from the sources: importing 280 models takes
minutes."""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cluster.capacity.lora import WITHOUT_ADAPTERS, takes_adapters

VLLM = Path(importlib.util.find_spec("vllm").origin).parent  # pyright: ignore
CLASS = re.compile(r"^class (\w+)\(([^:]*?)\):", re.MULTILINE)
ENTRY = re.compile(r'"([\w.]+)": *\(\s*"[\w.]+",\s*"(\w+)",?\s*\)')


def bases() -> dict[str, set[str]]:
    """Class → the classes that it is derived from, of all models."""
    found = defaultdict[str, set[str]](set)
    for folder in ("model_executor/models", "models"):
        for path in (VLLM / folder).rglob("*.py"):
            for name, derived in CLASS.findall(path.read_text()):
                found[name] |= set(re.findall(r"\w+", derived)) - {name}
    return found


def with_adapters(derived: dict[str, set[str]]) -> set[str]:
    known, before = {"SupportsLoRA"}, 0
    while len(known) != before:
        before = len(known)
        known |= {name for name, above in derived.items() if above & known}
    return known


def architectures() -> Iterator[tuple[str, str]]:
    """Architecture → class, without the draft models of speculative decoding, which nobody serves alone."""
    source = (VLLM / "model_executor/models/registry.py").read_text()
    tables = re.split(r"^_(?=\w+ = \{)", source.partition("\n_VLLM_MODELS = {")[0], flags=re.MULTILINE)[1:]
    for table in tables:
        if not table.startswith(("SPECULATIVE", "TRANSFORMERS_BACKEND")):
            yield from ENTRY.findall(table)


def test_adapters_are_on_for_the_architectures_onto_which_vllm_loads_them() -> None:
    able, listed = with_adapters(bases()), dict(architectures())
    assert len(listed) > 250 and listed["LlamaForCausalLM"] in able
    without = {architecture for architecture, name in listed.items() if name not in able}
    assert set(WITHOUT_ADAPTERS.split()) == without
    assert takes_adapters({}) and takes_adapters({"architectures": []}) and takes_adapters({"architectures": [7]})
