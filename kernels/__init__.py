"""Tensor programs of fastsvi: noise, sampling, densities, transforms and updates.

Every operation stands in one file that holds a torch reference and the public function; its Triton
form is in the file of the same name under ``kernels/triton``, imported on first use on a GPU.
Shapes always carry all three axes: fit ``F``, particle ``P`` and element ``D``.
"""
