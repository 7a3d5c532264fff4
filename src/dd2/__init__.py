"""dd2: one-step image generation from autoregressive models (Distilled Decoding 2, arXiv 2510.21003)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the one place that says it
__all__ = ["OneStepPipeline", "__version__"]

if TYPE_CHECKING:
    from dd2.pipeline import OneStepPipeline


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed, so that `dd2 --help` is instant."""
    if name == "OneStepPipeline":
        from dd2.pipeline import OneStepPipeline

        return OneStepPipeline
    raise AttributeError(f"module 'dd2' has no attribute {name!r}")
