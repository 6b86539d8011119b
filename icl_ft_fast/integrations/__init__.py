"""Thin adapters to evaluation harnesses; each module imports its harness, so none is imported unless asked for."""
