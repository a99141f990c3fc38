"""The operations in plain PyTorch, block by block: linear memory on any device."""
