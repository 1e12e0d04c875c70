"""npz snippets to shards, on CPU nodes; never torch."""
