"""Clips and captions: annotations, decoding, sampling, batches, and clips made on the fly."""
