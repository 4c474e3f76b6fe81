"""Preference groups -> trained adapters. The only room that knows TRL."""
