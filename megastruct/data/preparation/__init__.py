"""Make token shards from text shards, and inspect them."""
