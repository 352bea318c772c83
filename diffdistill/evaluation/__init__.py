"""Measuring samples: image grids, feature network, metrics, the results file and the report.

Nothing here knows a network, a method or a chain: images come in as uint8 (N, H, W, C), results as plain dicts.
"""
