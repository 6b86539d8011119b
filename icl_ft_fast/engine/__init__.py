"""What was asked of a model, computed once: the prefix tree, the KV cache, log-likelihoods, generation, the ledger."""
