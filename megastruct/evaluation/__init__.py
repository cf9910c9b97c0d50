"""Sixth floor: measures finished models on text, on token shards, and with the tasks of lm-evaluation-harness."""
