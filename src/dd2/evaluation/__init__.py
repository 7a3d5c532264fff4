"""What a run is worth: feature networks, references, metrics with intervals, likelihood, path length, speed, and the report."""
