"""What a config may say, and what goes together. Nothing here imports torch."""
