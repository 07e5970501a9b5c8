"""The documentation: pages, and in ``generate`` what writes those that are told from the code."""
