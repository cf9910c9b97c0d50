"""Token shards: their manifest, their files, and training from them."""
