"""A model too large for the machine is refused by `springtide up` and `run` before Ray starts, and before anything large is imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.test_fit import huge

HEAVY = {"ray", "vllm", "torch", "transformers", "numpy", "huggingface_hub", "gguf", "safetensors", "aiohttp", "starlette"}
"""What takes from a tenth of a second to ten seconds to import, on two cores that have something else to do."""
LISTED = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))))
from cluster.cli.commands import main
main()
"""


@pytest.mark.parametrize("command", ["up", "run"])
def test_a_model_that_cannot_fit_is_refused_without_large_imports(tmp_path: Path, command: str) -> None:
    """A second is the bar. What is imported decides about it, and is the same on every machine."""
    environment = {**os.environ, "SPRINGTIDE_HOME": str(tmp_path / "home"), "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", LISTED, command, "--model", str(huge(tmp_path / "huge", 800))]
    refused = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    words = r"huge does not fit: weights, adapters and the engine itself need 1602\.\d GiB, and there are [\d.]+ GiB\. "
    assert refused.returncode == 2 and re.search(words, refused.stderr), refused.stderr
    assert not (tmp_path / "home").exists(), "nothing has started"
    assert HEAVY & {*json.loads(refused.stdout.splitlines()[-1])} == set()
