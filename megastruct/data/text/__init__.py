"""Training straight from text shards, tokenised ahead of the trainer."""
