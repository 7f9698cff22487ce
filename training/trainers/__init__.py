"""The Trainers, and what they do during a run."""
