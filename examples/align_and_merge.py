"""Align two independently trained MLPs and average them.

    python examples/align_and_merge.py

Both learn the same task (scikit-learn's 8x8 digits) from different initialisations and different batches. The
average is taken twice: of the networks as they are, and after the units of B were brought onto those of A.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightspace as ws
from weightspace.spec import Weights, output_change
from weightspace.zoo import spec_of


def trained(seed: int, hidden: int, steps: int, x: Tensor, y: Tensor) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


def distance(a: Weights, b: Weights) -> float:
    return sum((a[name] - b[name]).square().sum().item() for name in a) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", help="a .safetensors file for the merged network")
    arguments = parser.parse_args()

    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16.0, torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    net, other = (trained(seed, arguments.hidden, arguments.steps, x[train], y[train]) for seed in (1, 2))
    a, b = net.state_dict(), other.state_dict()

    spec = spec_of(net)
    aligned, report = ws.align.weight_matching(spec, reference=a, weights=b, restarts=2, seed=0)
    print(report.summary())
    print(f"the function of B changed by {output_change(net, b, aligned, x[test]):.1e} of its largest value")

    merged = ws.merge.average([a, aligned], spec=spec)
    networks = {"A": a, "B": b, "average": ws.merge.average([a, b], spec=spec), "aligned average": merged}
    print(f"\n{'network':<16} {'distance to A':>13} {'test loss':>10} {'accuracy':>9}")
    for name, weights in networks.items():
        with torch.no_grad():
            logits = torch.func.functional_call(net, weights, (x[test],))
        loss = nn.functional.cross_entropy(logits, y[test]).item()
        accuracy = (logits.argmax(-1) == y[test]).float().mean().item()
        print(f"{name:<16} {distance(a, weights):>13.3f} {loss:>10.3f} {accuracy:>9.3f}")

    if arguments.output is not None:
        from weightspace.zoo import save_network

        print(f"\nmerged network in {save_network(arguments.output, merged)}")


if __name__ == "__main__":
    main()
