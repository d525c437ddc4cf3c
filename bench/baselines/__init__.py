"""The published ways of editing, step by step, to measure against; tested against the authors' own results."""
