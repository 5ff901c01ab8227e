"""Drafters: whatever proposes a tree of tokens for the target model to verify."""
