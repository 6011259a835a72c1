"""A tagger trained by Accelerate: the import of nn is all that fastseq changes."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from fastseq import nn  # was: from torch import nn


class Tagger(nn.Module):
    """Says of each number whether the sum so far is positive."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 20, 1)
    data = TensorDataset(x, (x.cumsum(1) > 0).float())
    accelerator = Accelerator(cpu=True)
    model = Tagger()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        DataLoader(data, batch_size=16, shuffle=True),
    )
    for _ in range(5):
        for inputs, wanted in loader:
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), wanted)
            accelerator.backward(loss)
            optimizer.step()
    accelerator.print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
