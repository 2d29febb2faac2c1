"""What all benchmarks share: interleaved rounds, their figures, charts, and the files of results."""
