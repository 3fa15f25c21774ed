"""What can be wrong with residuals, what each fault looks like, and from a text or a table back to the fault. Standard library only."""
