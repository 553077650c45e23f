"""What an encoder has learned."""
