"""A model at work, each shared prefix computed once: prefix tree, KV cache, log-likelihoods, generation, ledger."""
