"""The computer a policy runs on: what it is, which precisions it executes, which variant of a bundle suits it."""
