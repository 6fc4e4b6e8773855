"""T5's kernels in C for x86-64 processors: a decode step is one call where torch takes some hundred. Optional."""
