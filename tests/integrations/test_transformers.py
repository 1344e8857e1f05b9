"""The Trainer of Hugging Face's transformers: `resume_from_checkpoint`."""

import pytest
import torch

from tests.integrations import toy

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("installed")]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = toy.model()

    def forward(self, inputs, labels):
        return {"loss": toy.loss_of(self.net, inputs, labels)}


def trainer(folder, optim):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        optim=optim,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"inputs": inputs, "labels": targets} for inputs, targets in toy.data()]
    return transformers.Trainer(model=Net(), args=arguments, train_dataset=rows)


def losses_of(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_a_resumed_training(tmp_path, optim):
    whole = trainer(tmp_path, optim)
    whole.train()
    resumed = trainer(tmp_path, optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))

    assert len(losses_of(whole)) == 12
    assert losses_of(resumed) == losses_of(whole)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
