"""What is neither network nor image: options, records, checkpoints, score tables and numbers from them."""
