"""Stages over folders of shards: one shard at a time here, or many at once on Ray."""
