"""What happens to finished checkpoints."""
