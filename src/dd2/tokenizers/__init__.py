"""Images to codes and back: raster (LlamaGen's VQ) and multi-scale (VAR's), and how they are trained."""
