"""Where text comes from: shards of a disk or the hub, found, checked, and read document by document."""
