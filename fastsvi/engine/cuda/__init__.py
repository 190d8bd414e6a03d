"""Steps written as CUDA: from the loop nests of :mod:`fastsvi.engine.loops` to kernels."""
