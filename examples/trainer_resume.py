"""Hugging Face's Trainer (on Accelerate) under fastopt: a training stopped and resumed to the bit.

Needs `pip install transformers accelerate`; the model is built here, and nothing is downloaded. Takes seconds. Exits
with 1 where a loss is not that of the run that never stopped.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from checks import WrongResultError, require_same_losses

import fastopt

STEPS = 16
VOCABULARY = 64


def trainer(folder: Path) -> transformers.Trainer:
    """A tiny Llama over rows of tokens that count upwards."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.arange(64 * 16).view(64, 16) % VOCABULARY]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return transformers.Trainer(model=transformers.LlamaForCausalLM(shape), args=arguments, train_dataset=rows)


def losses_of(run: transformers.Trainer) -> list[float]:
    """One a step."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main() -> None:
    """Compare a training in one go with one that was resumed from its own checkpoint."""
    torch.set_num_threads(1)  # sums in one order
    fastopt.install()
    with tempfile.TemporaryDirectory() as name:
        whole = trainer(Path(name))
        whole.train()
        resumed = trainer(Path(name))
        resumed.train(resume_from_checkpoint=str(Path(name) / f"checkpoint-{STEPS // 2}"))
    require_same_losses("the resumed training", losses_of(whole), losses_of(resumed))
    for (place, kept), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        if not torch.equal(kept, other):
            raise WrongResultError(f"{place} differs")
    print(f"{STEPS} steps, resumed from step {STEPS // 2}: every loss and weight is that of the run that never stopped")


if __name__ == "__main__":
    try:
        main()
    except WrongResultError as error:
        sys.exit(str(error))
