"""The optimizer: planes of state, hyper-parameters, and the step pipeline."""
