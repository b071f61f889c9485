"""THE equations, in plain PyTorch, at most a screen an operation: the specification, and the only oracle of the tests.

Nothing here is fast. forward(...) can be differentiated by autograd; backward(...) is what that must give.
"""
