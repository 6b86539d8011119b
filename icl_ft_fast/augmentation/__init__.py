"""Augmentation: statements that follow from the documents, written by a model or by rule.

strategies (what is asked for, and how replies become rows) -> prompts -> generators -> store; run ties them for the
command, batches for a study; steps filters rows.
"""
