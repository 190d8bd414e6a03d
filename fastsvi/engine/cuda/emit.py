"""Write a scheduled program as CUDA C++: one kernel for many steps, or kernels for one.

In the *block form* a thread block takes all steps of a fit, with barriers between passes and its
arrays in shared memory. In the *kernel form* passes that need not wait for each other are a kernel,
large products are left to cuBLAS, and whoever launches them puts them into a CUDA graph.
"""

from fastsvi.engine.cuda.block import BlockSource, emit_block
from fastsvi.engine.cuda.kernels import KernelSource, Launch, Place, Product, emit_kernels

__all__ = [
    "BlockSource",
    "KernelSource",
    "Launch",
    "Place",
    "Product",
    "emit_block",
    "emit_kernels",
]
