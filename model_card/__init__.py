"""The model card of a checkpoint, from a template and files of results."""
