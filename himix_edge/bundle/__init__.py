"""A bundle's files, from whoever it comes: read, checked, and never more than data."""
