"""Where the weights go."""
