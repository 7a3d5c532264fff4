"""Metrics, likelihood, speed, plots and reports."""
