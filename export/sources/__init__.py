"""Where pictures come from: folders, globs, lists, tar shards, and URLs of these."""
