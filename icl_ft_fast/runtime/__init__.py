"""Processes, machines and files that survive; knows nothing of models."""
