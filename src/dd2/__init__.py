"""dd2: one-step image generation from autoregressive models (Distilled Decoding 2, arXiv 2510.21003)."""

__version__ = "0.1.0"
