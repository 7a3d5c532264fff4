"""The training loop and what it needs: schedules, EMA, checkpoints, the metrics log, teacher samples."""
