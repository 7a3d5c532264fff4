"""Baselines that need no distillation."""
