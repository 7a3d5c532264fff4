"""Where this model's folder is: diffusers tells a component its own folder, and nobody the one around it."""

from pathlib import Path


class Folder:
    """The folder around a component's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def from_pretrained(cls, path: str, **_: object) -> "Folder":
        """Diffusers gives the folder of this file."""
        return cls(Path(path).parent)

    def save_pretrained(self, path: str, **_: object) -> None:
        """Refuse: there are no weights here."""
        raise NotImplementedError(f"copy {self.path}, or use dd2.OneStepPipeline.save_pretrained")
