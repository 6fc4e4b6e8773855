"""The engine's path for CUDA: a paged cache, Triton kernels, and decode steps of static shape replayed as CUDA graphs.

Its kernels have run through Triton's interpreter and have been compiled for sm_80 and sm_90; nothing here has run on a
card yet, so its speed is unknown and its tests marked `gpu` are still to be seen passing.
"""
