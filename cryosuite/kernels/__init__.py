"""Pure tensor functions: Fourier, CTF, slices, rotations, shells, density."""
