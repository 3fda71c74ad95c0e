"""What runs within the sandbox's own process. Standard library only, and light to import."""
