"""Recipes that ship with crossmask: YAML runs and their DeepSpeed settings, as package data."""
