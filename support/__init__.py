"""Imported by the scripts; nothing in here is about a method."""
