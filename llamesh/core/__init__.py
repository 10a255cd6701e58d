"""Decisions, pure: a snapshot goes in, a value comes out. No trio, clock, random, socket or file in here."""
