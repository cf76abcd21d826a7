"""PAdam by name in other trainers: a file for each, which that trainer loads and nothing in the package imports."""
