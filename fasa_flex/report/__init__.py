"""Pictures and tables of profiles and of results."""
