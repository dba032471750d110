"""FLOD-9M: detection sets merged, with pseudo boxes."""
