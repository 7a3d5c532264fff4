"""The engine under every training: loop, stages, checkpoints, processes, EMA, schedules, and arrays on disk. Knows no method."""
