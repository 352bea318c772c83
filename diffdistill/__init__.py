"""Distillation of diffusion models into few-step samplers, in JAX."""
