"""Clips and captions: annotations, decoding, sampling, batches and synthetic clips."""
