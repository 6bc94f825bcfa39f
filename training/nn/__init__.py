"""Building blocks of policy networks."""
