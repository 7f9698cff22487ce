"""Captioned images, from any source to batches. Each step is one file, and data flow in this order:

1. `sources.py` opens a file, folder or dataset, whole or as a stream, with the columns that it has.
2. `table.py` finds the columns and reads the rows as a table of images, captions and ids.
3. `checks.py` merges the rows of each image and reports everything that is wrong.
4. `splits.py` runs these steps for both splits of a run; `streaming.py` does the same row by row for a stream.
5. `augmentation.py` and `feature_cache.py` make the views of an image that training sees.
6. `collator.py` makes batches.

`inspection.py` prints what a run would train on. `vocabulary.py` and `word_vectors.py` learn from the captions.
"""
