"""Training of AttnCap captioners with transformers' Trainer."""
