"""Readers of the formats that preference data come in."""
