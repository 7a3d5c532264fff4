"""Lists of prompts in the formats that the field's benchmarks come in."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dd2.data.scene_captions import Part, captions
from dd2.data.tables import TEXT_KEYS, is_text, json_of, records_of
from dd2.errors import InputError
from dd2.files import text_lines
from dd2.places import absolute

EMBEDDED: dict[str, Part] = {"scenes": "seen", "scenes-unseen": "unseen"}
"""Name of an embedded list -> the scenes' captions that it holds."""

GROUP_KEYS = ("category", "style", "tag")
"""What it calls the part of a benchmark that a prompt belongs to."""

LONGEST = 5_000
"""Characters of a prompt: no encoder reads as many, so a longer one is a file in the wrong place."""

HINT = "give a text file with one prompt a line, a .csv, .json or .jsonl of prompts, or features of dd2 text-features"


@dataclass(frozen=True)
class Prompts:
    """Prompts in order.

    Attributes:
        texts: as they were written, without blanks around them.
        source: where they come from, for messages.
        groups: of each its category or style, where the list has such; else empty.
        keys: of each the name that its list gives it (MJHQ's image names), where there are such; else empty.
        records: of each its line of a .jsonl, unchanged: what GenEval's scorer reads beside the images; else empty.
    """

    texts: tuple[str, ...]
    source: str
    groups: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    records: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse lists without prompts, and texts that no encoder reads."""
        if not self.texts:
            raise InputError(f"prompts {self.source}: there are none in it; {HINT}")
        for number, text in enumerate(self.texts, 1):
            if not is_text(text):
                raise InputError(
                    f"prompts {self.source}: number {number} holds half a character (a lone surrogate); write it again"
                )
            if len(text) > LONGEST:
                raise InputError(
                    f"prompts {self.source}: number {number} has {len(text.split()):,} words ({len(text):,} characters), where "
                    f"text encoders read about a hundred; at most {LONGEST:,} characters are taken for a prompt"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self) -> str:
        """SHA-256 of the texts in order, as a JSON list: the same list in another format has the same."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def described(self) -> dict[str, Any]:
        """What is stored beside numbers that were made with them."""
        return {"prompts": absolute(self.source), "prompts_count": len(self), "prompts_sha256": self.digest()}


def typed(texts: Sequence[str]) -> Prompts:
    """Prompts of a command line or a call; an empty text is the empty prompt."""
    return Prompts(tuple(text.strip() for text in texts), "as typed")


def read_prompts(source: str) -> Prompts:
    """A list of prompts by name: an embedded one ("scenes", "scenes-unseen"), or a file.

    Files: text (one a line; an empty line is an error, as it shifts all that follow), .csv with a column prompt, caption or text,
    .jsonl of records with such a key (GenEval), .json: a list of texts or records, {style: [texts]} (HPSv2) or {name: record}
    (MJHQ's meta_data.json).

    Raises:
        InputError: there is no such list, or it holds something else.
    """
    if source in EMBEDDED:
        known = captions(EMBEDDED[source])
        return Prompts(tuple(caption.text for caption in known), source, groups=tuple(caption.kind for caption in known))
    file = Path(source)
    lines = text_lines(file, "prompts", HINT)
    kind = file.suffix.lower()
    if kind == ".jsonl":
        return _of_json_lines(lines, source)
    if kind == ".json":
        return _of_json(json_of("\n".join(lines), f"prompts {source}"), source)
    if kind in (".csv", ".tsv"):
        return _of_records(records_of("\n".join(lines), source, f"prompts {source}"), source)
    texts = [line.strip() for line in lines]
    if "" in texts:
        raise InputError(f"prompts {source}: line {texts.index('') + 1} is empty; give one prompt a line")
    return Prompts(tuple(texts), source)


def _of_json_lines(lines: Sequence[str], source: str) -> Prompts:
    kept = [line for line in lines if line.strip()]
    found = _of_records(records_of("\n".join(kept), source, f"prompts {source}"), source)
    return Prompts(found.texts, source, found.groups, records=tuple(kept))


def _of_json(content: Any, source: str) -> Prompts:
    if isinstance(content, dict) and content and all(isinstance(value, list) for value in content.values()):
        styled = [(str(style), text) for style, texts in content.items() for text in texts]
        return Prompts(_texts((text for _, text in styled), source), source, groups=tuple(style for style, _ in styled))
    if isinstance(content, dict):
        found = _of_records(list(content.values()), source)
        return Prompts(found.texts, source, found.groups, keys=tuple(map(str, content)))
    if isinstance(content, list) and all(isinstance(value, str) for value in content):
        return Prompts(_texts(content, source), source)
    return _of_records(content, source)


def _of_records(records: Any, source: str) -> Prompts:
    """Dictionaries with a text in each, and perhaps a group."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"prompts {source} hold no list of texts or of records with a {' or '.join(TEXT_KEYS)}; {HINT}")
    if not records:
        return Prompts((), source)
    text = next((key for key in TEXT_KEYS if key in records[0]), None)
    if text is None:
        raise InputError(
            f"prompts {source}: the first record has {', '.join(map(str, records[0])) or 'nothing'}, none of "
            f"{', '.join(TEXT_KEYS)}; {HINT}"
        )
    group = next((key for key in GROUP_KEYS if all(isinstance(record.get(key), str) for record in records)), None)
    groups = () if group is None else tuple(record[group] for record in records)
    return Prompts(_texts((record.get(text) for record in records), source), source, groups)


def _texts(values: Iterable[Any], source: str) -> tuple[str, ...]:
    found = list(values)
    for number, value in enumerate(found, 1):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"prompts {source}: number {number} is {'empty' if isinstance(value, str) else 'no text'}; {HINT}")
    return tuple(value.strip() for value in found)
