"""Backprojection and the diagnosis of sign, hand and pose convention."""
