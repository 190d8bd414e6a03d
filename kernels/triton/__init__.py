"""Triton forms of the operations: imported by the first call on a GPU, never by ``import fastsvi``.

A file here has the name of the operation's file one floor up, which holds its torch reference, its
registration and the public function. Order inside a file: device functions, kernels, launchers,
compile cases. Pointers say shape and space. Every kernel also compiles without a GPU:
``ci/compile_kernels.py`` gathers the ``COMPILE_CASES`` of all files.
"""
