"""The engine made of this project's own C++ kernels, compiled on the machine that runs them."""
