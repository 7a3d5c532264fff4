"""Pictures with captions: a list of both beside them, or a text file beside each."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dd2.data.layout import SPLITS, Item, own_split
from dd2.data.pictures import Pictures
from dd2.data.tables import TEXT_KEYS, is_text, records_of
from dd2.errors import InputError

LISTS = ("metadata.jsonl", "metadata.csv")
"""Names of lists, as the datasets library's folders of images have them: file_name and text in each record."""

NAME_KEY = "file_name"


def captions_in(pictures: Pictures) -> dict[str, str] | None:
    """Caption of each picture by name; None where they have none.

    A metadata.jsonl or metadata.csv names pictures relative to its own folder; those that none names are left out. Else every
    picture must have a .txt of its own name beside it.

    Raises:
        InputError: a list is damaged, or names a picture that is not there.
    """
    lists = [name for name in pictures.beside if PurePosixPath(name).name in LISTS]
    listed = [found for name in lists if (found := _listed(pictures, name)) is not None]
    if listed:
        return _joined(pictures, [pair for found in listed for pair in found])
    own = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in pictures.names}
    beside = {*pictures.beside}
    if not own or not all(text in beside for text in own.values()):
        return None
    return {name: _text(pictures, text) for name, text in own.items()}


def captioned_layout(found: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, list[Item]], bool]:
    """Different captions in the order of the pictures; "train" and "test" -> pictures with the numbers of their captions; and
    whether the test pictures were set aside here. Folders called train and test (or val, …) split them; else one in 20 is for
    tests.
    """
    captions = tuple(dict.fromkeys(found[name] for name in sorted(found)))
    number = {text: label for label, text in enumerate(captions)}
    items = [(name, number[found[name]]) for name in sorted(found)]
    of: dict[str, list[Item]] = {"train": [], "test": [], "": []}
    for item in items:
        of[next((SPLITS[part.lower()] for part in item[0].split("/")[:-1] if part.lower() in SPLITS), "")].append(item)
    outside = of.pop("")
    if not (of["train"] and of["test"]):
        return captions, own_split(items), True
    if outside:
        raise InputError(f"pictures lie in folders of train and test, and outside of them, such as {outside[0][0]}; move these")
    return captions, of, False


def _joined(pictures: Pictures, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Lists as one.

    Raises:
        InputError: they are empty, or a picture has two captions.
    """
    if not pairs:
        raise InputError(f"{pictures.what} {pictures.path}: {' and '.join(LISTS)} name no picture; remove them, or fill them")
    found: dict[str, str] = {}
    for picture, text in pairs:
        if found.setdefault(picture, text) != text:
            raise InputError(f"{pictures.what} {pictures.path}: {picture} is listed with two captions; keep one of them")
    return found


def _listed(pictures: Pictures, name: str) -> Sequence[tuple[str, str]] | None:
    """Pictures and captions of a list; None where it is about something else than captions."""
    place = f"{pictures.what} {pictures.path}: {name}"
    folder, known = PurePosixPath(name).parent, {*pictures.names}
    found = []
    records = records_of(_decoded(pictures, name), name, place)
    if records and (NAME_KEY not in records[0] or not any(key in records[0] for key in TEXT_KEYS)):
        return None
    for row, record in enumerate(records, 1):
        text = next((record[key] for key in TEXT_KEYS if key in record), None)
        file: Any = record.get(NAME_KEY)
        if not isinstance(file, str) or not isinstance(text, str) or not text.strip() or not is_text(text):
            raise InputError(f"{place}: record {row} needs {NAME_KEY} and {' or '.join(TEXT_KEYS)}, both texts")
        picture = str(folder / file)
        if picture not in known:
            raise InputError(f"{place}: record {row} names {file}, which is not beside it; remove the record, or add the picture")
        found.append((picture, " ".join(text.split())))
    return found


def _text(pictures: Pictures, name: str) -> str:
    text = " ".join(_decoded(pictures, name).split())
    if not text:
        raise InputError(
            f"{pictures.what} {pictures.path}: {name} is empty; write a caption into it, or remove it and its picture"
        )
    return text


def _decoded(pictures: Pictures, name: str) -> str:
    try:
        return pictures.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{pictures.what} {pictures.path}: {name} is not UTF-8 ({error}); convert it") from error
