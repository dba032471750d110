"""Data curation on Apache Beam: from raw image-text pairs to a training set, with a reason for every pair left out."""
