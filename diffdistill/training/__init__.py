"""Machinery: mesh, state, checkpoints, metrics, loop. Knows no method, no model, no data."""
