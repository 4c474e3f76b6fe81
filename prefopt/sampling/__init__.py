"""Prompts -> candidate answers."""
