"""Searching for RoPE factors. The search itself (space, evolution, log) knows numpy alone; what it minimises (needle) knows models."""
