"""A distilled generator as others get it: a folder, a model card, the Hub, graphs that need no dd2."""
