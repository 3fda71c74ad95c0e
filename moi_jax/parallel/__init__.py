"""Meshes, logical axes, and how arrays are placed on them."""
