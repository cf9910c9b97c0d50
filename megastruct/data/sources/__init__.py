"""Sources of text: find, check and read shards on a disk or on the Hugging Face hub, document by document."""
