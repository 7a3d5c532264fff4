"""What the folders of labelled pictures mean: CLASS/IMAGE, below TRAIN and TEST where there are such."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dd2.errors import InputError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation"), "test"),
}
"""Names of folders, in small letters, that tell what their images are for."""

HELD_OUT_EVERY = 20
"""One image in this many is kept from training, where no folders train and test (or val) say which."""

Item = tuple[str, int]
"""Name and class of an image."""


@dataclass(frozen=True)
class Layout:
    """Labelled pictures.

    Attributes:
        class_names: of the folders, in the order of the labels: by number where all are numbers, else by the alphabet.
        items: "train" and "test" -> their pictures.
        own: the test pictures were set aside here, and not by folders.
    """

    class_names: tuple[str, ...]
    items: dict[str, list[Item]]
    own: bool


def layout(names: Sequence[str], place: str) -> Layout:
    """Classes and splits of pictures by their names.

    Folders around everything are passed over. If the outermost ones then are called train and test (or val, …), they split the
    images; the next ones are the classes, and all images lie equally deep below them.

    Args:
        names: of at least one picture, with "/" between folders.
        place: where they are, for messages.

    Raises:
        InputError: the folders have no such meaning; the message says what was found.
    """
    parts = {name: name.split("/") for name in names}
    around = _around(list(parts.values()))
    inner = {name: folders[around:] for name, folders in parts.items()}
    tops = {folders[0] for folders in inner.values() if len(folders) > 1}
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    if splits and len(splits) == len(tops):
        return _split_by_folders(inner, splits, place)
    if splits and any(len(folders) > 2 for folders in inner.values() if folders[0] in splits):
        other = sorted(tops - splits.keys())
        raise InputError(f"{place} has {_listed(sorted(splits))} beside {_listed(other)}; keep either splits or classes there")
    _check_depth(inner, place, "CLASS/IMAGE")
    names_of = _in_order({folders[0] for folders in inner.values()})
    number = {name: label for label, name in enumerate(names_of)}
    return Layout(names_of, own_split([(name, number[folders[0]]) for name, folders in inner.items()]), own=True)


def _around(parts: list[list[str]]) -> int:
    """How many folders lie around all pictures, the last that could be a class not counted."""
    depth = 0
    while len({tuple(folders[: depth + 1]) for folders in parts}) == 1 and min(map(len, parts)) - depth > 2:
        if SPLITS.get(parts[0][depth].lower()) == "test":
            break  # who has no more than these does not mean to train on them
        depth += 1
    return depth


def _split_by_folders(inner: dict[str, list[str]], splits: dict[str, str], place: str) -> Layout:
    if loose := [name for name, folders in inner.items() if len(folders) == 1]:
        raise InputError(f"{place} has images beside {_listed(sorted(splits))}, such as {loose[0]}; sort them into classes")
    if "train" not in splits.values():
        raise InputError(f"{place} has {_listed(sorted(splits))} alone, and no train/; rename it, or give its folder")
    by_top: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, folders in inner.items():
        by_top[folders[0]][name] = folders[1:]
    for top, below in sorted(by_top.items()):
        flat = sum(len(folders) == 1 for folders in below.values())
        if flat == len(below):
            raise InputError(
                f"{place}: {top}/ holds {flat:,} images and no class folders; sort them into classes, or move it away"
            )
        _check_depth(below, f"{place}/{top}", "CLASS/IMAGE")
    classes = {split: set[str]() for split in ("train", "test")}
    for top, below in by_top.items():
        classes[splits[top]] |= {folders[0] for folders in below.values()}
    if unknown := sorted(classes["test"] - classes["train"]):
        raise InputError(
            f"{place}: {_listed(unknown)} is a class of the test images alone; train images are of {len(classes['train'])} others"
        )
    names_of = _in_order(classes["train"])
    number = {name: label for label, name in enumerate(names_of)}
    items: dict[str, list[Item]] = {"train": [], "test": []}
    for name, folders in inner.items():
        items[splits[folders[0]]].append((name, number[folders[1]]))
    return Layout(names_of, items, own=False) if items["test"] else Layout(names_of, own_split(items["train"]), own=True)


def _check_depth(inner: dict[str, list[str]], place: str, wanted: str) -> None:
    """Refuse pictures that do not lie equally deep."""
    depths = Counter(len(folders) for folders in inner.values())
    if depths.keys() == {1}:
        raise InputError(
            f"{place} holds {depths[1]:,} images and no class folders; sort them as {wanted}, one folder if all are alike"
        )
    if len(depths) > 1:
        examples = {len(folders): name for name, folders in inner.items()}
        found = ", ".join(f"{count:,} like {examples[depth]}" for depth, count in sorted(depths.items()))
        raise InputError(f"{place} holds images at several depths ({found}); bring all to {wanted}")


def _in_order(classes: set[str]) -> tuple[str, ...]:
    if all(re.fullmatch("[0-9]+", name) for name in classes):
        return tuple(sorted(classes, key=lambda name: (int(name), name)))
    return tuple(sorted(classes))


def own_split(items: list[Item]) -> dict[str, list[Item]]:
    """Pictures of "train" and "test": one in `HELD_OUT_EVERY` is for tests."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = max(1, len(items) // HELD_OUT_EVERY)
    return {
        "test": [items[index] for index in order[:held_out]],
        "train": [items[index] for index in order[held_out:]] or items,
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
