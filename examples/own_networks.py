"""A zoo of your own networks: train some, store their state dicts, and read off the weights what each was for.

    python examples/own_networks.py

Each network is a plain nn.Sequential fitted to one of three curves, from its own random initialisation. The
metanetwork sees the weights alone and names the curve.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.tasks import evaluate, train, train_config

CURVES = {"line": lambda x: x, "parabola": lambda x: 2 * x**2 - 1, "wave": lambda x: torch.sin(5 * x)}


def fit(networks: int, steps: int) -> tuple[list[dict[str, Tensor]], list[int], Tensor]:
    """State dicts, curves and final losses. All networks are trained at once, as one batch of weights."""
    nets = [network() for _ in range(networks)]
    stacked = {
        name: torch.stack([net.state_dict()[name] for net in nets]).requires_grad_()
        for name in nets[0].state_dict()
    }
    kinds = [index % len(CURVES) for index in range(networks)]
    x = torch.linspace(-1, 1, 64)[:, None]
    curves = torch.stack([curve(x) for curve in CURVES.values()])
    optimiser = torch.optim.Adam(stacked.values(), lr=1e-2)
    for _ in range(steps):
        outputs = ws.nets.evaluate_batch(nets[0], stacked, x)
        losses = (outputs - curves[kinds]).square().mean(dim=(1, 2))
        optimiser.zero_grad()
        losses.sum().backward()
        optimiser.step()
    state_dicts = [{name: t[row].detach() for name, t in stacked.items()} for row in range(networks)]
    return state_dicts, kinds, losses.detach()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300, help="of training, for each network")
    parser.add_argument("--model", default="dws", help="dws, mlp or statistics")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("own-networks"), help="folder of zoo and run")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    state_dicts, kinds, losses = fit(arguments.networks, arguments.steps)
    zoo = ws.Zoo.from_state_dicts(
        state_dicts,
        module=network(),
        labels={"curve": kinds},
        metrics={"loss": losses},
        fractions=(0.7, 0.1, 0.2),
        name="curves",
    )
    path = zoo.save(arguments.output / "curves.h5", overwrite=True)
    population = ws.Zoo.open(path)["curves"]
    print(f"{path}: {population.networks} networks, median loss {losses.median():.4f}")
    print(population.spec)

    config = train_config(
        {"zoo": str(path), "target": "curve", "model": arguments.model, "epochs": arguments.epochs}
    )
    run = arguments.output / arguments.model
    train(config, run, overwrite=True, progress=False)
    report = evaluate(run)
    print(f"{arguments.model}: test accuracy {report.metrics['accuracy']:.3f} on {report.networks} networks")


if __name__ == "__main__":
    main()
