"""Texts that images are drawn of: lists of prompts, text encoders, and what those make of them."""
