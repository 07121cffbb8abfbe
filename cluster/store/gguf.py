"""Turns a GGUF file into a folder in Hugging Face layout: safetensors, configuration, tokenizer and chat template.

vLLM serves safetensors, and training continues from them. transformers' own reader makes full numbers of the file's blocks. That runs in a
process of its own (``python -m cluster.store.gguf FILE FOLDER``): it needs torch and memory for the whole model, and a damaged file may
end it. It reads nothing but the one file, reaches no hub, and runs no code from the file. The same file and the same release of transformers
give the same bytes.

Numbers keep their type where the file has whole ones (F32, F16); blocks become bfloat16.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cluster.errors import ModelNotFound, VersionRefused
from cluster.store import gguf_header
from cluster.store.gguf_header import MAGIC, NUMBERS, STRING, Field, Header, Tensor

ENDING = ".gguf"
WHOLE = {"F64": "f8", "F32": "f4", "F16": "f2", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
"""Kind of a tensor that holds numbers and no blocks → how numpy reads it."""
PART = re.compile(r"-\d{5}-of-(\d{5})$")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def check(file: Path) -> None:
    """Raise `VersionRefused` for what is no GGUF file, or one part of several."""
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise VersionRefused(f"{file} is no GGUF file.", "Give a GGUF file, or the folder of a model.", param="model")
    if part := PART.search(file.stem):
        raise VersionRefused(
            f"{file} is one of {int(part[1])} parts.", "Make one file of them: llama-gguf-split --merge FIRST_PART OUT.", "model"
        )


def check_installed(how: str) -> None:
    """Raise `ModelNotFound` where the package that reads the format is missing. ``how``: one sentence that says how to install it."""
    if find_spec("gguf") is None:
        raise ModelNotFound("Reading a GGUF file needs the package gguf, which is not installed.", how, param="model")


def convert(file: Path, folder: Path, tell: Callable[[str], None]) -> None:
    """Write the model in ``file`` to ``folder``. ``tell`` hears what is being read or written.

    Raises `VersionRefused` with the reader's own last words.
    """
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "cluster.store.gguf", str(file), str(folder)]
        environment = {**os.environ, **OFFLINE}
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            for line in child.stdout or ():
                tell(line.strip())
            status = child.wait()
        finally:
            child.kill()  # after Ctrl-C; nothing where it has ended
            child.wait()
        if status != 0:
            errors.seek(0)
            words = [line.strip() for line in errors if line.strip()] or [f"its reader ended with status {status}"]
            raise VersionRefused(
                f"{file} cannot be converted: {words[-1][:500]}", "Give another file of the model.", param="model"
            )


# in the process of its own


def write(file: Path, folder: Path) -> None:
    """Convert ``file``, and print each step. Raises whatever transformers raises."""
    header = gguf_header.read(file)  # first, so that a damaged file fails at once
    if (
        "rope_freqs.weight" in header.tensors
    ):  # transformers leaves it out without a word, and long contexts would be answered badly
        sys.exit("transformers cannot read its rotary scaling (rope_freqs); take the model's safetensors")
    dtype = as_dtype(header)
    print(f"{len(header.tensors)} tensors as {dtype}", flush=True)
    read_once(file, header)
    import torch
    import transformers

    auto = cast(Any, transformers)  # partly typed
    # The whole path: a relative one would mean a file of that name in the working directory. The folder is empty: nothing beside it is read.
    given: dict[str, Any] = {"gguf_file": str(file.resolve()), "local_files_only": True, "trust_remote_code": False}
    as_numbers: dict[str, Any] = {"quantization_config": auto.GgufConfig(dequantize=True), "dtype": getattr(torch, dtype)}
    with tempfile.TemporaryDirectory() as empty:
        tokenizer = auto.AutoTokenizer.from_pretrained(empty, **given)
        model, found = auto.AutoModelForCausalLM.from_pretrained(empty, output_loading_info=True, **as_numbers, **given)
    if missing := sorted(map(str, found["missing_keys"])):  # they would be random numbers
        sys.exit(f"it has no tensor for {missing[0]} ({len(missing)} are missing)")
    print("writing them", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_once(file: Path, header: Header) -> None:
    """Let transformers have the file as it was read here. It would parse it four times by the reader of the package gguf, which takes three
    seconds each time, and make the map of names once for each module of the model."""
    import gguf  # pyright: ignore[reportMissingTypeStubs]

    package, read = cast(Any, gguf), given(file, header)
    package.GGUFReader = lambda *_: read  # pyright: ignore[reportUnknownLambdaType]
    package.get_tensor_name_map = functools.cache(package.get_tensor_name_map)


def given(file: Path, header: Header) -> Any:
    """What transformers uses of a ``gguf.GGUFReader``."""
    import numpy as np
    from gguf import GGMLQuantizationType  # pyright: ignore[reportMissingTypeStubs]

    data: Any = np.asarray(np.memmap(file, mode="r"))
    tensors = [
        SimpleNamespace(name=name, tensor_type=GGMLQuantizationType(tensor.kind), data=_blocks(tensor, data))
        for name, tensor in header.tensors.items()
    ]
    return SimpleNamespace(fields={name: _Parts(field) for name, field in header.fields.items()}, tensors=tensors)


def _blocks(tensor: Tensor, data: Any) -> Any:
    """A tensor's numbers, or its rows of blocks as bytes. Nothing is copied."""
    held = data[tensor.begin : tensor.end].view(WHOLE.get(tensor.dtype, "u1"))
    return held.reshape(*tensor.shape[:-1], -1)


class _Parts:
    """A setting as ``gguf.ReaderField`` has it: every number is a list of one."""

    def __init__(self, field: Field) -> None:
        import numpy as np

        kind = field.types[-1]
        self.types = field.types
        self.parts = field.items if kind == STRING else np.array(field.items, NUMBERS[kind])[:, None]
        self.data = range(len(field.items))


def as_dtype(header: Header) -> str:
    """The type in which a model's numbers are written."""
    return _dtype({tensor.dtype for tensor in header.tensors.values() if len(tensor.shape) > 1})


def _dtype(types: set[str]) -> str:
    """
    >>> _dtype({"F32"}), _dtype({"F16", "F32"}), _dtype({"Q4_1", "Q8_0"}), _dtype({"BF16"})
    ('float32', 'float16', 'bfloat16', 'bfloat16')
    """
    if types <= {"F32"}:
        return "float32"
    return "float16" if types <= {"F32", "F16"} else "bfloat16"


if __name__ == "__main__":
    sys.modules["mistral_common"] = cast(Any, None)  # the package gguf would import it, for a second, to write files of Mistral's
    write(Path(sys.argv[1]), Path(sys.argv[2]))
