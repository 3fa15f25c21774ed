"""From an error text, a claimed table or live modules to the fault, its slot and the change that mends it."""
