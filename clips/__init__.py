"""The nouns that both sides of a shard share: clips, snippets, codecs, the format. Never torch."""
