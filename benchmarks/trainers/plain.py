"""What one writes by hand: PyTorch and transformers, batches padded to their longest example, the whole vocabulary at every position."""

from typing import Any

import torch

from benchmarks.trainers import Assignment, Clock, Finding, assignment, tell


def train(job: Assignment) -> Finding:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.precision), local_files_only=True)
    if job.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=job.lora["rank"], lora_alpha=job.lora["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, job.learning_rate, weight_decay=0.0)
    clock, steps = Clock(job), len(job.batches)
    for step, batch in enumerate(job.batches):
        width = max(len(example["input_ids"]) for example in batch)
        gaps = [width - len(example["input_ids"]) for example in batch]
        ids = torch.tensor([example["input_ids"] + [0] * gap for example, gap in zip(batch, gaps, strict=True)])
        mask = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
        labels = ids.masked_fill(mask == 0, -100)
        for row, example in zip(labels, batch, strict=True):
            row[: example["prompt_tokens"]] = -100
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.item())
    return clock.finding()


if __name__ == "__main__":
    tell(train(assignment()))
