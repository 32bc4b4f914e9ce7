"""Make the golden file of the current format version, once; it refuses to replace one.

A golden file is never made again: when the format changes, its version changes, and a new file joins the old.

Run: python tests/zoo/golden/make.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from weightspace.testing import tiny_zoo
from weightspace.zoo import FORMAT_VERSION, Zoo


def main() -> None:
    zoo = tiny_zoo(networks=6)
    psnr = np.array([20, 24.5, np.nan, 28, 32, 40], dtype=np.float32)
    weights = (np.arange(6 * 105, dtype=np.float32).reshape(6, 105) - 300) / 64
    population = replace(
        zoo["inr"],
        weights=weights,
        metrics={"psnr": psnr},
        hyperparameters={"learning_rate": np.array([1, 2, 3, 4, 5, 6], dtype=np.float32) / 1024},
    )
    half = replace(population, weights=weights.astype(np.float16), dtype="float16")
    items = replace(zoo.sources["tiny"], items=np.arange(3 * 36, dtype=np.uint8).reshape(3, 6, 6))
    path = Path(__file__).with_name(f"zoo-v{FORMAT_VERSION}.h5")
    Zoo({"half": half, "inr": population}, {"tiny": items}, {"name": "golden", "seed": 7}).save(path)
    print(path, path.stat().st_size, Zoo.open(path).digest)


if __name__ == "__main__":
    main()
