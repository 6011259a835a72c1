"""A forecaster trained by Lightning: the import of nn is all that fastseq changes."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastseq import nn  # was: from torch import nn


class Forecaster(lightning.LightningModule):
    """Predicts each next value of a series."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, hidden, num_layers=2, dropout=0.1, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0])

    def training_step(self, batch, _):
        (series,) = batch
        loss = nn.functional.mse_loss(self(series[:, :-1]), series[:, 1:])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    phase = torch.rand(64, 1, 1) * 6
    series = torch.sin(torch.arange(40).view(1, 40, 1) * 0.3 + phase)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Forecaster(), DataLoader(TensorDataset(series), batch_size=16, shuffle=True))
    print(f"loss {float(trainer.callback_metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
