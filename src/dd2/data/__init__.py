"""Data that the project brings along."""
