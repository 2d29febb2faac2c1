"""The optimizer: state tensors of state, hyper-parameters, and the step pipeline."""
