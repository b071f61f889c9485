"""The kernels, a file each with its launch; tiles.py sums.py mask.py are what they share."""
