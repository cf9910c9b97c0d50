"""Text shards to token shards, and a look at the result."""
