"""The training system: state, optimizer, sharding, step, loop, checkpoints, metrics. It knows no task by name."""
