"""Training directly on text shards, which are tokenised ahead of the trainer."""
