"""The training record of a checkpoint, and averaging, packing and sharing checkpoints."""
