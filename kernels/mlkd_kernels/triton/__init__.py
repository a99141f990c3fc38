"""The Triton kernels. Nobody outside imports this package where Triton is not installed."""
