"""Rescue of many repositories: each one listed, downloaded, converted, verified, and published or stored."""
