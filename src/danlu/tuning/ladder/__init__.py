"""Ladder side networks beside a frozen model."""
