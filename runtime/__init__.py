"""What a run stands on: devices and processes, checkpoints, logs, files, workers."""
