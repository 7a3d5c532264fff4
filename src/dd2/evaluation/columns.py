"""The numbers of an evaluation: what they are called and how they are written, wherever they are shown."""

from typing import NamedTuple


class Column(NamedTuple):
    """One number of a method.

    Attributes:
        heading: what it is called.
        kind: its format.
    """

    heading: str
    kind: str


COLUMNS = {
    "frechet": Column("Fréchet distance", ".2f"),
    "sfid": Column("sFID", ".2f"),
    "kid": Column("KID", ".4g"),
    "inception_score": Column("IS", ".2f"),
    "precision": Column("precision", ".3f"),
    "recall": Column("recall", ".3f"),
    "density": Column("density", ".3f"),
    "coverage": Column("coverage", ".3f"),
    "within_class_spread": Column("within-class spread", ".3g"),
    "teacher_nll": Column("teacher NLL", ".1f"),
    "accuracy": Column("accuracy", ".3f"),
    "agreement": Column("agreement", ".3f"),
    "clip_b32_prefix": Column("CLIP B/32, prefix", ".4f"),
    "clip_b32": Column("CLIP B/32", ".4f"),
    "clip_g14_prefix": Column("CLIP g/14, prefix", ".4f"),
    "clip_g14": Column("CLIP g/14", ".4f"),
    "clipscore_l14": Column("CLIPScore L/14", ".2f"),
}
"""By their key in metrics.json, in the order in which they are shown."""
