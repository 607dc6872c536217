"""Servers and recorders that tests share."""
