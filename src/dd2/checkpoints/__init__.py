"""Reading and writing models: our own folders of safetensors and JSON, and other projects' checkpoints."""

from dd2.checkpoints.var import load_var

__all__ = ["load_var"]
