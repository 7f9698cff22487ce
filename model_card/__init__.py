"""Measure a checkpoint, analyse its errors, calibrate its confidence and render its model card."""
