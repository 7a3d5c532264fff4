"""Store the trained digits teacher (with its tokenizer) and classifier as package data, in float16.

make assets     runs the three trainings and then this
"""

from pathlib import Path

import torch

from dd2.checkpoints.native import load_teacher, save_teacher
from dd2.evaluation.classifier import load_classifier, save_classifier

LIMIT = 2 * 2**20


def main() -> None:
    """Write src/dd2/assets/digits and check its size."""
    runs, assets = Path("runs"), Path("src/dd2/assets/digits")
    save_teacher(assets / "teacher", load_teacher(runs / "digits_teacher" / "teacher"), torch.float16)
    save_classifier(assets / "classifier", load_classifier(runs / "digits_classifier" / "classifier"), torch.float16)
    size = sum(file.stat().st_size for file in assets.rglob("*") if file.is_file())
    print(f"{assets}: {size / 2**20:.2f} MiB")
    if size > LIMIT:
        raise SystemExit(f"the embedded models may take {LIMIT} bytes together")


if __name__ == "__main__":
    main()
