"""Small, local, trustworthy generative reward models."""
