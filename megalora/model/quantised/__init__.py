"""Read quantised weights as they were published: what a folder's config says, which tensors a
linear is stored as, and the values that they mean.

A decoder gives the part ``[rows, columns]`` of a matrix in float32, bit for bit that part of the
whole, and reads the stored bytes that the part needs. No quantisation library is used.
"""
