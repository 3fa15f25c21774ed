"""What can be wrong with residuals, how each fault shows, and the way back to it. Standard library only."""
