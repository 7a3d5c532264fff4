"""Reading and writing models: our own folders of safetensors and JSON, and other projects' checkpoints."""

from dd2.checkpoints.llamagen import load_llamagen
from dd2.checkpoints.mar import load_mar
from dd2.checkpoints.var import load_var

__all__ = ["load_llamagen", "load_mar", "load_var"]
