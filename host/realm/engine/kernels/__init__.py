"""Triton kernels of the forward pass. Each launcher is a plain function on tensors that allocates nothing.

So all of them can be captured in a CUDA graph, and run through Triton's interpreter on a CPU
(``TRITON_INTERPRET=1`` before triton is imported). Importing a module here imports triton.

A KV cache is one tensor a layer, ``[2, pages + 1, kv_heads, PAGE_SIZE, head_dim]``, keys first. Tables hold
page numbers, int32. What no token has been written to may hold anything, NaN too: it is never used.
"""
