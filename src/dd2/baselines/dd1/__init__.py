"""Distilled Decoding 1 (Liu et al., arXiv 2412.17153): regress a deterministic map from noise to the teacher's tokens."""
