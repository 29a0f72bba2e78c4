"""The comparison study: which method, from which start, with how much data."""
