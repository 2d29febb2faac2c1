"""Gradients: taken over from autograd, brought to their homes, and what stands in for them on parameters."""
