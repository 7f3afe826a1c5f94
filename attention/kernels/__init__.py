"""Triton kernels of paged attention. Each file is one launch and the kernel behind it; importing one imports Triton.

All of them find the key at position ``p`` of a sequence by themselves, at ``table[p // page] * page + p % page``, so the tile
of keys that a program works on has nothing to do with the size of a page. Nothing here looks at a length on the host: a
grid depends on shapes alone, and a program that has nothing to do ends.
"""
