"""Verbs that need no Trainer."""
