"""Adapters made here: real PEFT folders with random tensors, for tests that are not about training."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def make_adapter(folder: Path, base: Path, rank: int = 8, seed: int = 0, scale: float = 0.5) -> Path:
    """A LoRA adapter for the attention projections of the Llama in ``base``. Large enough a ``scale`` changes every answer."""
    model = json.loads((base / "config.json").read_text())
    hidden, layers = model["hidden_size"], model["num_hidden_layers"]
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(layers):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random.normal(0, scale, (rank, hidden)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.normal(0, scale, (hidden, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
    settings = {**lora, "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": str(base), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def make_weights(folder: Path, base: Path, seed: int = 0, noise: float = 0.01) -> Path:
    """The model in ``base`` with noise on every matrix: same shape, other answers. With much ``noise`` it is garbage."""
    random = np.random.default_rng(seed)
    shutil.copytree(base, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    noisy = {n: (t + random.normal(0, noise, t.shape).astype(t.dtype)) if t.ndim == 2 else t for n, t in tensors.items()}
    path.unlink()
    save_file(noisy, path, metadata={"format": "pt"})
    return folder


def make_smaller(folder: Path, base: Path) -> Path:
    """The model in ``base`` without its last layer: another shape, and an answer to the same questions."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if f".layers.{last}." not in n}
    shorter = {key: value[:last] for key, value in config.items() if key == "layer_types"}
    (folder / "config.json").write_text(json.dumps({**config, **shorter, "num_hidden_layers": last}))
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spoil(folder: Path) -> Path:
    """One NaN in a folder's first tensor."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first].flat[0] = np.nan
    save_file(tensors, path)
    return folder
