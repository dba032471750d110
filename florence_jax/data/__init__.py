"""Data: sources of records, transforms, tokenizers, and the streams that feed training and evaluation."""
