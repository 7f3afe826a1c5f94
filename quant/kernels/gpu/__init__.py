"""Triton kernels of quantized linears. Each file is one launch and the kernel behind it, or what they share; importing one
imports Triton."""
