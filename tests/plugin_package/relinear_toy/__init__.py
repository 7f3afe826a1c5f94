"""A format and a kernel for relinear."""
