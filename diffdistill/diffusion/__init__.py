"""The diffusion process as functions of log-SNR: process, schedules, parameterisations, loss weights, guidance.

Everything here is jax.numpy in float32 and broadcasts; nothing knows a network, a sampler or a method.
"""
