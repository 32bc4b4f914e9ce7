"""Read the digit from the weights of an INR, in plain PyTorch.

python examples/plain_torch.py                      # makes a small zoo first
python examples/plain_torch.py digits.h5 --epochs 20
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

import weightspace as ws


def accuracy(model: nn.Module, dataset: ws.ZooDataset) -> float:
    model.eval()
    with torch.no_grad():
        hits = [model(weights).argmax(-1) == labels for weights, labels in DataLoader(dataset, 256)]
    return torch.cat(hits).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("zoo", nargs="?", help="a zoo with a label of 10 classes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--count", type=int, default=200, help="networks of the zoo that is made")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    if arguments.zoo is None:
        arguments.zoo = "small-digits.h5"
        quick = {"protocol.steps": 200}  # blurred digits, but quick to fit
        ws.generate("digits-inr", arguments.zoo, count=arguments.count, overrides=quick, progress=False)

    augment = ws.Compose([ws.SignFlip(), ws.GaussianNoise(0.05)])
    train, test = ws.ZooDataset(arguments.zoo, "train", augment=augment), ws.ZooDataset(arguments.zoo, "test")
    model = nn.Sequential(ws.Normalisation.fit(train), ws.models.DWS(train.spec, out_features=10, hidden=16))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=len(train) > 32)

    for epoch in range(arguments.epochs):
        train.epoch = epoch  # new augmentations in every epoch
        model.train()
        for weights, labels in loader:
            loss = nn.functional.cross_entropy(model(weights), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"epoch {epoch + 1:>3}  loss of the last batch {loss.item():.3f}")
    print(f"{len(train)} training networks, test accuracy {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
