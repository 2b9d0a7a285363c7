"""CPU kernels in C++: compiled once for several instruction sets, called through ctypes, tied to no torch version."""
