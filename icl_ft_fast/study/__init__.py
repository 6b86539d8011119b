"""The study: ways of answering, over tasks and seeds, to results, statistics, cost and a decision."""
