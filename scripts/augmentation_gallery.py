"""Draw the gallery of docs/augmentations.md: every augmentation that acts on weights, on digits and on 1-D sines.

python scripts/augmentation_gallery.py                        # makes two small zoos first
python scripts/augmentation_gallery.py --zoo fashion.h5 -o .
"""

import argparse
import tempfile
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import weightspace as ws
from weightspace.datasets import AUGMENTATIONS, Augmentation, call_text, draw_augmented
from weightspace.errors import ConfigError


def registered() -> Iterator[Augmentation]:
    """One of each name with its default options; one of each kind where the first option is a choice."""
    for kind in AUGMENTATIONS.values():
        options = signature(kind, eval_str=True).parameters.values()
        choices = next((_choices(option.annotation) for option in options), ())
        yield from [kind(choice) for choice in choices] if choices else [kind()]


def _choices(annotation: Any) -> tuple[Any, ...]:
    what = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return get_args(what) if get_origin(what) is Literal else ()


def visible(dataset: ws.ZooDataset) -> Iterator[Augmentation]:
    """Those that suit the networks and act on their weights; why not is printed of the others."""
    members = range(min(16, len(dataset)))
    before = dataset.spec.flatten(dataset.read(members)[0])
    for augment in registered():
        try:
            dataset.augment = augment
        except ConfigError as error:
            print(f"not drawn: {error}")
            continue
        if dataset.spec.flatten(dataset.read(members)[0]).equal(before):
            print(f"not drawn: {call_text(augment)} acts on no weights")
        else:
            yield augment


def draw(path: Path, figure: Path, count: int, seed: int) -> None:
    zoo = ws.Zoo.open(path)
    name = next(iter(zoo))
    labels = zoo[name].labels
    dataset = ws.ZooDataset(zoo, None, target="label" if "label" in labels else next(iter(labels)))
    augments = sorted(
        visible(dataset), key=lambda augment: ("exactly", "approximately", "no").index(augment.keeps)
    )
    print(draw_augmented(zoo, augments, figure, count=count, draws=1, seed=seed, overwrite=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="of INRs of images; made unless given")
    parser.add_argument("--count", type=int, default=60, help="items of each zoo that is made")
    parser.add_argument("--steps", type=int, default=1000, help="of the fits of each zoo that is made")
    parser.add_argument("--columns", type=int, default=8, help="networks to draw; fewer of the sines")
    # whose draws are small and large, and mix by much and by little
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images"), metavar="OUTDIR")
    arguments = parser.parse_args()
    quick: Any = {
        "count": arguments.count,
        "overrides": {"protocol.steps": arguments.steps},
        "progress": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        digits, sines = arguments.zoo or Path(folder) / "digits.h5", Path(folder) / "sines.h5"
        if arguments.zoo is None:
            ws.generate("digits-inr", digits, views=2, **quick)
        ws.generate("sine-inr", sines, views=2, **quick)
        draw(digits, arguments.output / "augmentations.png", arguments.columns, arguments.seed)
        columns = min(4, arguments.columns)
        draw(sines, arguments.output / "augmentations-sines.png", columns, arguments.seed)


if __name__ == "__main__":
    main()
