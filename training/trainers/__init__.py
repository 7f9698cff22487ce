"""The Trainers and their callbacks."""
