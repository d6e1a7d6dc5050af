"""The training loop, checkpoints and schedules; knows no method by name."""
