"""What is neither network nor image: options, records, checkpoints, score tables and what is computed from them."""
